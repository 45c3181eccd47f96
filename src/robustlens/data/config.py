"""The settings of a data set, as a study file or the command line gives them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, lt=2**31)]
Side = Annotated[int, Field(ge=1, le=4096)]


class DataConfig(BaseModel):
    """Which images, how many of them, and at which size.

    ``source`` is looked up in this order:

    - ``mnist5k`` or ``digits``: real images that are installed with the library;
    - a bare name (``mnist``): the directory of that name under the environment variable ``ROBUSTLENS_DATA``, then a
      well-known Hub id (``ylecun/mnist``);
    - a path (``./my-images``): a directory of Hugging Face parquet files, or an image folder with one subdirectory
      per class, optionally below ``train/`` and ``test/``;
    - a Hub id (``owner/name``, or ``owner/name:configuration``).

    Validation examples are chosen from the training split, stratified by class, always the same ones. A source that
    has a validation split beside a test split keeps it; one that has no test split but a validation split (such as
    Tiny-ImageNet) is tested on that; one that has a training split alone gives a fifth of it, stratified, to testing.

    Every split is shuffled once, always in the same way, so that each of its beginnings has the class proportions of
    the whole; ``train``, ``valid`` and ``test`` keep at most that many examples of the beginning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    #: Classes to keep, by number or name; they are renumbered 0, 1, … in this order.
    classes: tuple[int | str, ...] | None = None
    #: At most this many examples of the split.
    train: Count | None = None
    valid: Count | None = None
    test: Count | None = None
    #: Part of the training split that becomes the validation split.
    valid_fraction: float = Field(default=0.1, gt=0, lt=1)
    #: Columns of a parquet or Hub source; None finds `image` or `img`, and `label` or `fine_label`.
    image_column: str | None = None
    label_column: str | None = None
    #: Shorter side, in pixels, that every image is scaled to first (bilinear, antialiased); None leaves the scale.
    resize: Side | None = None
    #: Side, in pixels, of the square that is then cut from the centre; None cuts nothing.
    size: Side | None = None
    #: The same for training images, where an augmentation that crops needs more than ``size``. Tiny-ImageNet:
    #: ``size = 56``, ``train_size = 64`` and the augmentation ``random-resized-crop`` with ``size = 56``.
    train_size: Side | None = None
