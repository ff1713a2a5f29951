"""Augmentation-augmented variational autoencoders: train them, evaluate the representation, explore what each choice does."""
__version__ = "0.1.0"

from .augment import ViewsConfig as ViewsConfig, draw_views as draw_views, random_views as random_views
from .data import DataConfig as DataConfig, InputError as InputError, load_data as load_data
from .decoder import Decoder as Decoder
from .encoder import Encoder as Encoder, ImageEncoder as ImageEncoder, Projection as Projection
from .features import Features as Features
from .loss import ObjectiveConfig as ObjectiveConfig, gaussian_kl as gaussian_kl, gaussian_log_likelihood as gaussian_log_likelihood
from .model import AAVAE as AAVAE, ModelConfig as ModelConfig, build_model as build_model
from .run import Config as Config, Run as Run, TrainConfig as TrainConfig
from .ranks import Failed as Failed, Interrupted as Interrupted
from .train import Diverged as Diverged, preset as preset, pretrain as pretrain
