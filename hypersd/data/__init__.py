"""Training data for any backbone: samples in, cached latents and text states out, taken by row number.

    data = prepare(open_source("my/pictures"), backbone, Path("runs/cache"))
    batch = data.take(step.rows(len(data)), step)

The order is whatever rows the training loop asks for, so there is no loader with a state to save.
"""

from hypersd.data.cache import Encoder, Transform, prepare
from hypersd.data.dataset import Batch, Dataset
from hypersd.data.files import DataError
from hypersd.data.sources import Sample, Source, SourceError, open_source

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Encoder",
    "Sample",
    "Source",
    "SourceError",
    "Transform",
    "open_source",
    "prepare",
]
