"""The explorers by name: `from aavae.explore import ReconstructionExplorer`.

Each is loaded when it is asked for. Only then are ipywidgets and anywidget imported; both come with `aavae[notebook]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import CompareExplorer as CompareExplorer
    from .maps import EmbeddingMap as EmbeddingMap
    from .maps import SimilarityExplorer as SimilarityExplorer
    from .monitor import TrainingMonitor as TrainingMonitor
    from .playground import AugmentationPlayground as AugmentationPlayground
    from .reconstructions import ReconstructionExplorer as ReconstructionExplorer
    from .studies import DensityExplorer as DensityExplorer
    from .studies import StudyExplorer as StudyExplorer
    from .widgets import digits_run as digits_run

MODULES = {
    "AugmentationPlayground": "playground",
    "ReconstructionExplorer": "reconstructions",
    "SimilarityExplorer": "maps",
    "EmbeddingMap": "maps",
    "TrainingMonitor": "monitor",
    "DensityExplorer": "studies",
    "StudyExplorer": "studies",
    "CompareExplorer": "compare",
    "digits_run": "widgets",
}
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
