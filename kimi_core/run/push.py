"""``kimi push``: a run's checkpoint goes to the Hugging Face hub, with a page about the run."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from kimi_core import __version__
from kimi_core.metrics import read_metrics
from kimi_core.run.best import read_best
from kimi_core.run.files import check_run
from kimi_core.run.folder import BEST, CHECKPOINT


def push(run: Path, repo: str, *, best: bool = False, public: bool = False) -> str:
    """Upload a checkpoint of the run, and return the address.

    Args:
        run: the run folder.
        repo: ``OWNER/NAME``; it is made if it does not exist.
        best: the checkpoint of the best evaluation, not the last one.
        public: whom a new repository is for; otherwise the owner alone sees it.

    Raises:
        ValueError: there is no such run or checkpoint, the name cannot be one, or a file that the
            page is made of is damaged.
        OSError: the hub could not be reached, or refused it.
    """
    validate_repo_id(repo)
    folder = run / (BEST if best else CHECKPOINT)
    if not (folder / "config.json").is_file():
        check_run(run)
        way = "set evaluation.best" if best else "it is written when the run ends"
        raise ValueError(f"{folder} has no model in Hugging Face format: {way}")
    page, api = card(run).encode(), HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_file(path_or_fileobj=page, path_in_repo="README.md", repo_id=repo)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message=f"{run.name}: {folder}")
    except Exception as error:  # The library's HTTP client is its own choice.
        raise OSError(
            f"Cannot push to {repo}: {error}\nLog in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        ) from error
    return str(address)


def card(run: Path) -> str:
    """What the page of the model says: accuracies before and after, and every setting."""
    _, evaluations = read_metrics(run / "metrics.jsonl")
    rows = [
        f"| {one.iteration} | {one.accuracy_greedy:.3f} | {one.accuracy_sampled:.3f} | {one.n} |"
        for one in (evaluations[:1] + evaluations[1:][-1:])
    ]
    table = ["| after iteration | greedy | sampled | prompts |", "|---|---|---|---|", *rows]
    found = read_best(run)
    best = f"\nBest evaluation: {found}.\n" if found else ""
    settings = (run / "config.toml").read_text()
    return (
        f"---\ntags: [kimi_core, reinforcement-learning]\n---\n\n# {run.name}\n\n"
        f"Trained with kimi_core {__version__}. Accuracy on held-out prompts:\n\n"
        + "\n".join(table)
        + f"\n{best}\n```toml\n{settings}```\n"
    )
