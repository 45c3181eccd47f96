"""The papers' tables and figures as studies, with the papers' numbers beside them: one file a paper."""
