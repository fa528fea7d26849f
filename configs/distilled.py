"""The network of `accurate.py`, trained on the mean probabilities of three such networks (Hinton et al., 2015).

Measured: 99.70 +- 0.02 % test accuracy (mean and sd, n = 5), NLL 0.0085, ECE 0.09 %; 18 minutes of training on one core
of an AMD EPYC with AVX-512. First train the teacher, three networks:

    python -m mnist_flax.population --config=configs/accurate.py --seeds=3
    scripts/train --config=configs/distilled.py
"""

from ml_collections import ConfigDict

from mnist_flax.preset import preset_dict


def get_config() -> ConfigDict:
    """Returns what differs from `accurate.py`."""
    config = preset_dict("accurate")
    config.seed = 10  # the teacher's networks have the seeds 0, 1, 2 ...
    config.train.teacher = "runs/accurate-seeds3"
    config.train.epochs = 24
    return config
