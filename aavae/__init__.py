"""Augmentation-augmented variational autoencoders: train them, evaluate the representation, explore each choice."""

__version__ = "0.1.0"

from .augment import ViewsConfig as ViewsConfig
from .augment import draw_views as draw_views
from .augment import random_views as random_views
from .config import Config as Config
from .config import TrainConfig as TrainConfig
from .config import preset as preset
from .data import DataConfig as DataConfig
from .datasets import load_data as load_data
from .decoder import Decoder as Decoder
from .encoder import Encoder as Encoder
from .encoder import ImageEncoder as ImageEncoder
from .encoder import Projection as Projection
from .errors import Diverged as Diverged
from .errors import Failed as Failed
from .errors import InputError as InputError
from .errors import Interrupted as Interrupted
from .evaluation.features import Features as Features
from .loss import ObjectiveConfig as ObjectiveConfig
from .loss import gaussian_kl as gaussian_kl
from .loss import gaussian_log_likelihood as gaussian_log_likelihood
from .model import AAVAE as AAVAE
from .model import ModelConfig as ModelConfig
from .model import build_model as build_model
from .run import Run as Run
from .run import Subject as Subject
from .train import pretrain as pretrain
