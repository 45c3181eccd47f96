"""Fuzzing of what reads files that anybody may have written; ``python -m tests.fuzz --minutes 10`` runs it for long."""
