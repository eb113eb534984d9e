"""The Hugging Face hub: owns which files of a model are fetched, and what is said when it says no.

Called by model_store for an org/name. huggingface_hub is imported inside the functions, for it is
not needed by a model that is here. It keeps what it fetched in its own cache.
"""

from pathlib import Path
from typing import Any

from cluster.model_folder import check_config
from cluster.preparation import ModelError, Progress, one_line, quiet

# Weights come second, when the config has been found good.
_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_WEIGHT_FILES = ["*.safetensors"]
# Subfolders and consolidated* hold the same weights again, in other formats.
_NEVER_DOWNLOADED = ["*/*", "consolidated*"]


def download(model: str, on_progress: Progress) -> Path:
    """The hub's own cached folder. Nobody waits for weights that would then be refused."""
    on_progress(f"looking up {model} on Hugging Face", None)
    check_config(_snapshot(model, _DESCRIPTION_FILES, on_progress), model)
    return _snapshot(model, _DESCRIPTION_FILES + _WEIGHT_FILES, on_progress)


def _snapshot(model: str, files: list[str], on_progress: Progress) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    here = f"{model} is no folder here"
    try:
        with quiet("huggingface_hub"):
            folder = hub.snapshot_download(
                model,
                allow_patterns=files,
                ignore_patterns=_NEVER_DOWNLOADED,
                tqdm_class=_byte_counter(model, on_progress),
            )
            return Path(folder)
    except errors.HFValidationError as error:
        raise ModelError(f"{here}, and no Hugging Face id (org/name) either") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model},"
            " then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{here}, and Hugging Face has no such model for you: check the spelling,"
            " or run `hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{here}, and Hugging Face cannot be reached: check the connection,"
            " or give the path of a model that is here"
        ) from error
    except Exception as error:  # the HTTP library's own, a full disk
        raise ModelError(
            f"{model} could not be downloaded ({one_line(error)}): start again to go on from there"
        ) from error


def _byte_counter(model: str, on_progress: Progress) -> type[Any]:
    """A bar for the hub that is never drawn. No fraction: the total grows as files begin."""
    from huggingface_hub.utils.tqdm import tqdm

    most = 0

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.n += n or 0
            if self.counts_bytes and self.n > most:
                most = self.n
                on_progress(f"downloading {model}: {most / 1e6:.0f} MB", None)

    return ByteCounter
