"""Averages under the interfaces that training loops have already: ``EMAModel`` of diffusers, ``ModelEmaV3`` of timm."""

from lagless.integrations.dropin._ema_model import EMAModel as EMAModel
from lagless.integrations.dropin._model_ema import ModelEmaV3 as ModelEmaV3
