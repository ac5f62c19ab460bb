"""Patched folders to the Hugging Face Hub.

The Hub's client commits last: large files go to the repository's storage first, then one commit names them all. So a
repository holds the whole folder or none of it, and after a broken upload the next one sends what is missing.
(`upload_folder` makes several commits for a large folder, so it is not used.)

The folder is read several times: its sums are checked, its files hashed again, then sent. It is watched from the first
of these to the commit, so that a folder that is written again meanwhile is never pushed half old, half new.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regsurgery.checkpoints.limits import MAX_JSON_BYTES
from regsurgery.checkpoints.reading import WEIGHT_SUFFIXES
from regsurgery.checkpoints.sums import SUMS_NAME, check_sums, digests_of, read_sums
from regsurgery.checkpoints.watched import Watched
from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.emit.run_record import RUN_RECORD_NAME, read_run_record
from regsurgery.errors import CheckpointError, HubError
from regsurgery.hub.client import check_name, client, told
from regsurgery.hub.space import SPACE_RECORD, space_of
from regsurgery.options import PushOptions, takes
from regsurgery.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Kind = Literal["model", "space"]
OURS: dict[Kind, set[str]] = {"model": {RUN_RECORD_NAME, SUMS_NAME}, "space": {SPACE_RECORD, SUMS_NAME}}
KEPT = {".gitattributes"}  # the Hub's own file; a repository with nothing else counts as empty


@dataclass(frozen=True)
class Destination:
    """A repository that may be written to, at the time it was checked.

    Attributes:
        head: its commit; None if there is no repository yet.
        new_branch: the revision is a branch that does not exist yet.
        files: the names in it.
    """

    repo: str
    head: str | None
    new_branch: bool
    files: frozenset[str]
    kind: Kind = "model"

    @property
    def is_ours(self) -> bool:
        return OURS[self.kind] <= self.files


@dataclass(frozen=True)
class Pushed:
    """What `push` did; for a dry run, what it would do, with `url` and `commit` None.

    Attributes:
        files: name -> bytes, for all files of the repository that regsurgery manages.
        removed: files of an earlier push that are no longer part of the model.
        paths: absolute paths on this machine -> what was published instead.
        space: the same of the Space, if there is one.
    """

    repo: str
    revision: str | None
    url: str | None
    commit: str | None
    pull_request: str | None
    files: dict[str, int]
    removed: tuple[str, ...]
    paths: dict[str, str]
    space: Pushed | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@takes(PushOptions)
def push(folder: str | Path, repo: str, options: PushOptions) -> Pushed:
    """Push a patched folder to the Hub as one commit, and its report as a Space if asked to.

    The token is found the way huggingface_hub finds it.

    Args:
        folder: what `patch` wrote; its verification must have passed and SHA256SUMS must hold.
        repo: USER/NAME. It is created if necessary; one that regsurgery wrote is updated and keeps its history.
        options: see `options.PushOptions`; its fields are the keyword arguments.

    Raises:
        CheckpointError: the folder is incomplete or changed, also while it is pushed, or was not verified.
        UserError: there is no report for a Space, see `space.space_of`.
        HubError: no token, no permission, a repository with other contents, a broken connection, ...
    """
    from regsurgery.emit.published import published
    from regsurgery.verification.patched import existing_folder

    progress, revision = options.progress, options.revision
    check_name(repo)
    root = existing_folder(folder)
    progress.stage("checksums")
    watched = Watched.of([root / SUMS_NAME, *(root / name for name in read_sums(root))])
    with watched.blamed():
        check_sums(root)
        _check_verified(root)
        ready = published(root, repo, revision)
        beside = space_of(root, repo, options) if options.space else None
    for path, shown in ready.paths.items():
        progress.say(f"local path {path} is published as {shown}")
    if beside is not None:
        check_name(beside.repo)
        watched = watched.beside(Watched.of(file for file in beside.files.values() if isinstance(file, Path)))
        progress.say(f"the photos in the report are published, too, in the Space {beside.repo}")
    if options.dry_run:
        planned = None if beside is None else Pushed(beside.repo, None, None, None, None, beside.sizes, (), {})
        return Pushed(repo, revision, None, None, None, ready.sizes, (), ready.paths, planned)

    more = " --space" if options.space else ""
    again = f"`regsurgery push {folder} {repo}{more}` finishes it without sending uploaded files again"
    place = destination(repo, options)
    place_beside = None if beside is None else destination(beside.repo, options, "space")
    sizes, sizes_beside = ready.sizes, {} if beside is None else beside.sizes
    with client() as api, watched.blamed():
        pushed = _sent(api, place, ready.files, watched, options, again)
        second = None
        if beside is not None and place_beside is not None:
            second = replace(_sent(api, place_beside, beside.files, watched, options, again), files=sizes_beside)
    return replace(pushed, files=sizes, paths=ready.paths, space=second)


def _sent(
    api: HfApi, place: Destination, files: dict[str, Path | bytes], watched: Watched, options: PushOptions, again: str
) -> Pushed:
    """Send `files` to a repository, made if necessary; without their sizes and paths."""
    repo, revision, sdk = place.repo, options.revision, "static" if place.kind == "space" else None
    with told(repo, again):
        if place.head is None:
            made = api.create_repo(repo, repo_type=place.kind, space_sdk=sdk, private=options.private, exist_ok=True)
            url, place = str(made), _made(api, place, again)
        else:
            url = f"{api.endpoint}/{'spaces/' if place.kind == 'space' else ''}{repo}"
        if place.new_branch:
            api.create_branch(repo, branch=revision or "main", exist_ok=True)
        removed = sorted(_outdated(api, place) - files.keys())
        commit = _commit(api, place, files, removed, watched, options)
    return Pushed(repo, revision, url, commit.oid, commit.pr_url, {}, tuple(removed), {})


def _made(api: HfApi, place: Destination, again: str) -> Destination:
    """A repository that was made now, with its first commit, on which no other push may have put one.

    Raises:
        HubError: another has.
    """
    info, files = _found(api, place.repo, place.kind)
    if files - KEPT:
        raise HubError(f"{place.repo}: the repository has changed in the meantime; {again}")
    return replace(place, head=info.sha, files=files)


def _found(api: HfApi, repo: str, kind: Kind, revision: str | None = None) -> tuple[Any, frozenset[str]]:
    """What the Hub says of a repository, and the names in it, without those that the Hub puts into a new Space."""
    info = (api.model_info if kind == "model" else api.space_info)(repo, revision=revision)
    if kind == "space" and len(api.list_repo_commits(repo, repo_type=kind)) == 1:
        return info, frozenset()
    return info, frozenset(file.rfilename for file in info.siblings or ())


def check_before_patching(repo: str, *, private: bool | None, verification: bool) -> None:
    """Raise if the folder that is about to be written could not be pushed; nothing is written here."""
    if not verification:
        raise HubError(f"{repo}: only verified folders are pushed; leave out --no-verify or --push")
    destination(repo, PushOptions(private=private))


def _check_verified(folder: Path) -> None:
    if RUN_RECORD_NAME not in read_sums(folder):
        raise CheckpointError(f"{folder / RUN_RECORD_NAME}: not in {SUMS_NAME}; patch the model again")
    verdict = read_run_record(folder)["verify"]
    if verdict is None:
        raise CheckpointError(f"{folder}: was written without verification; patch the model again, without --no-verify")
    if not verdict["passed"]:
        raise CheckpointError(f"{folder}: its verification failed; patch the model again")


def destination(repo: str, options: PushOptions, kind: Kind = "model") -> Destination:
    """Find out whether `push` may write to `repo`; nothing is written.

    Raises:
        HubError: it may not; the message says why.
    """
    from huggingface_hub import errors

    revision, create_pr = options.revision, options.create_pr
    check_name(repo)
    if create_pr and revision is not None:
        raise HubError(f"{repo}: pull requests go to the main branch; give either --create-pr or --revision")
    with client() as api, told(repo):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                f"{repo}: the token of {user['name']} may only read; log in (hf auth login) with one that may write"
            )
        new_branch = False
        try:
            try:
                info, files = _found(api, repo, kind, revision)
            except errors.RevisionNotFoundError:
                (info, files), new_branch = _found(api, repo, kind), True
        except errors.RepositoryNotFoundError:
            _check_may_create(repo, user)
            if create_pr:
                raise HubError(
                    f"{repo}: does not exist, so there is nothing to open a pull request on; push without --create-pr"
                ) from None
            return Destination(repo, None, revision not in (None, "main"), frozenset(), kind)
        if not create_pr:
            api.auth_check(repo, repo_type=kind, write=True)
    place = Destination(repo, info.sha, new_branch, files, kind)
    if options.private and not info.private:
        raise HubError(f"{repo}: exists and is public; make it private in its settings, or push without --private")
    if place.files - KEPT and not place.is_ours and not options.force:
        raise HubError(
            f"{repo}: exists, and regsurgery did not write its contents ({len(place.files - KEPT)} files); choose "
            "another name, or replace its contents with --force"
        )
    return place


def _check_may_create(repo: str, user: dict[str, Any]) -> None:
    namespace = repo.partition("/")[0]
    roles = {user["name"]: "admin", **{org["name"]: org.get("roleInOrg") for org in user.get("orgs", ())}}
    if namespace not in roles:
        raise HubError(
            f"{repo}: does not exist, or {user['name']} may not see it; {user['name']} cannot create it, not being a "
            f"member of {namespace}; check the spelling, or log in (hf auth login) as somebody else"
        )
    if roles[namespace] == "read":
        raise HubError(
            f"{repo}: {user['name']} has only read access to {namespace}; ask its administrators for write access"
        )


def _outdated(api: HfApi, place: Destination) -> set[str]:
    """Files of the previous push, or of whatever else is replaced by force, that are no longer needed."""
    if not place.is_ours:
        return set(place.files - KEPT)
    with temporary_folder() as scratch:
        api.hf_hub_download(place.repo, SUMS_NAME, repo_type=place.kind, revision=place.head, local_dir=scratch)
        return (read_sums(scratch).keys() | {SUMS_NAME}) & place.files


def _commit(
    api: HfApi,
    place: Destination,
    files: dict[str, Path | bytes],
    removed: list[str],
    watched: Watched,
    options: PushOptions,
) -> Any:
    """Send the weights one by one, then everything in one commit on top of `place`'s head.

    Raises:
        CheckpointError: a file changed meanwhile; nothing is committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    revision, create_pr, progress = options.revision, options.create_pr, options.progress
    additions = [CommitOperationAdd(name, _at_once(content)) for name, content in sorted(files.items())]
    _check_digests(additions, files)
    weights = [addition for addition in additions if Path(addition.path_in_repo).suffix in WEIGHT_SUFFIXES]
    progress.stage("upload", sum(addition.upload_info.size for addition in weights), in_bytes=True)
    for addition in weights:
        api.preupload_lfs_files(
            place.repo, [addition], repo_type=place.kind, revision=revision, create_pr=create_pr, free_memory=False
        )
        progress.advance(addition.upload_info.size)
    progress.stage("commit")
    deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
    watched.check()
    return api.create_commit(
        place.repo,
        [*deletions, *additions],
        repo_type=place.kind,
        commit_message=options.message or f"Patched by regsurgery {__version__}",
        revision=revision,
        create_pr=create_pr,
        parent_commit=None if create_pr else place.head,
    )


def _at_once(content: Path | bytes) -> Path | bytes:
    """The bytes of a small file, which the client would read once to hash it, and again to send it."""
    if isinstance(content, bytes) or content.suffix in WEIGHT_SUFFIXES or content.stat().st_size > MAX_JSON_BYTES:
        return content
    return content.read_bytes()


def _check_digests(additions: list[Any], files: dict[str, Path | bytes]) -> None:
    """Raise `CheckpointError` if what is sent is not what the SHA256SUMS say that is sent with it."""
    sums = files[SUMS_NAME]
    assert isinstance(sums, bytes)
    expected = digests_of(sums.decode())
    for addition in additions:
        name = addition.path_in_repo
        if name != SUMS_NAME and addition.upload_info.sha256.hex() != expected[name]:
            raise CheckpointError(
                f"{files[name]}: changed while it was pushed, so nothing was committed; run the same command again "
                "when nothing writes to it"
            )
