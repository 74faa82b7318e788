"""When the Hugging Face hub does not give a checkpoint or a data set: why, and what to do."""

from __future__ import annotations

from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError


def unreachable(name: str, revision: str | None, error: BaseException, options: str = "") -> FileNotFoundError:
    """The error to raise for what `error`, or what caused it, says. options: of `hf download` for this repository."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    download = " ".join(filter(None, [f"hf download {name}", f"--revision {revision}" if revision else "", options]))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return FileNotFoundError(
            f"{name} is gated: accept its terms at https://huggingface.co/{'datasets/' if 'dataset' in options else ''}{name}, "
            "then log in with `hf auth login`"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return FileNotFoundError(
            f"{name} no longer has the revision {revision} that this study names: the repository was rewritten. Look at its "
            f"history, and if you trust the new state, name that"
        )
    return FileNotFoundError(
        f"cannot reach {name!r} on the Hugging Face hub, and it is not in the local cache ({type(causes[0]).__name__}). Download "
        f"it once where there is a network, with `{download}`, or name the folder of a local copy."
    )
