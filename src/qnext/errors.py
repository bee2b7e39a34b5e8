"""Every error qnext raises on purpose.

    QnextError
    +-- ConfigError        config.json contradicts itself or describes an unknown architecture
    +-- CheckpointError    a model folder is incomplete, damaged, or in a format that is refused
    +-- TokenizerError     tokenizer files are missing, damaged, or do not fit the model
    +-- TemplateError      a chat template cannot be compiled or rejects the messages
    +-- RequestError       a request is impossible: empty prompt, id out of range, context overflow
    +-- BackendError       a kernel backend was asked for and does not fit this machine
    +-- DataError          training or evaluation data cannot be used
    +-- RecipeError        a training recipe is misspelt, contradicts itself, or does not fit
    +-- TrainingError      a training run cannot go on: disk full, diverged, nothing to resume

Each message is one to three sentences: what was expected, what was found, where, and what to do.
The command line prints the message alone and exits with status 2; ``QNEXT_TRACEBACK=1`` shows the
trace. All of them are ``ValueError`` too, so library users can catch them without this file.
"""


class QnextError(ValueError):
    """Base of all errors meant for the user; its text is complete without a traceback."""


class ConfigError(QnextError):
    """A model configuration is incomplete, contradicts itself, or is not supported."""


class CheckpointError(QnextError):
    """A checkpoint folder is incomplete, damaged, or in a format that is refused."""


class TokenizerError(QnextError):
    """Tokenizer files are missing, damaged, or do not fit the model."""


class TemplateError(QnextError):
    """A chat template cannot be compiled or rejects the messages it was given."""


class RequestError(QnextError):
    """A request cannot be served as written."""


class BackendError(QnextError):
    """A kernel backend was asked for by name and does not fit."""


class DataError(QnextError):
    """Training or evaluation data cannot be used as given."""


class RecipeError(QnextError):
    """A training recipe is misspelt, contradicts itself, or does not fit its data or model."""


class TrainingError(QnextError):
    """A training run cannot start or go on; what was saved stays."""
