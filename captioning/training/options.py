"""Options of the training loop."""
from dataclasses import dataclass, fields

from captioning.errors import InputError


@dataclass(frozen=True)
class TrainingOptions:
    """What the training loop needs of the command line; the fields are the flags of train.py, in the same units.

    from_features: True if the model reads stored features, not images. flags: {name: value} of all settings of the
    run, recorded in its checkpoints and compared when the run is resumed.
    """
    batch_size: int
    accumulate: int
    epochs: int
    patience: int
    decoder_lr: float
    encoder_lr: float
    lr_schedule: str
    weight_decay: float
    grad_clip: float
    amp: bool
    finetune_encoder: bool
    region_epochs: int
    seed: int
    workers: int
    save_every: float
    save_path: str
    resume: str
    from_features: bool
    flags: dict

    @classmethod
    def from_settings(cls, settings, **additional_flags):
        """Options for `settings`, a namespace of the flags of train.py or finetune.py, all of them known; InputError if
        batches have fewer images than parts."""
        if settings.accumulate > settings.batch_size:
            raise InputError(f"--accumulate {settings.accumulate} must be at most --batch_size {settings.batch_size}, "
                             "as each part needs an image")
        values = vars(settings)
        names = {field.name for field in fields(cls)} - {"from_features", "flags"}
        flags = {name: value for name, value in (values | additional_flags).items()
                 if isinstance(value, bool | int | float | str | None)}
        return cls(**{name: values[name] for name in names}, from_features=not settings.from_pixels, flags=flags)
