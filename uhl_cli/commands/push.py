"""`uhl push`: an adapter file or a task file with its model card to a repository on the hub."""

from __future__ import annotations

from collections.abc import Callable

from uhl_cli.commands.options import PushOptions
from uhl_cli.errors import UsageError
from uhl_cli.formats.adapter_card import CARD, adapter_card
from uhl_cli.formats.sharing import SharedFile
from uhl_cli.hub.reference import is_repo, is_revision
from uhl_cli.hub.upload import upload
from uhl_cli.reports import PushReport

# Asked before texts become public, with what becomes public; returns whether the user agrees.
Consent = Callable[[str], bool]


def run_push(options: PushOptions, consent: Consent) -> PushReport:
    """Read the file, write its card, and upload both in one commit.

    Guarantee: nothing is sent before the file is validated and `consent` agrees to the texts in it; nothing at all with
    `options.dry_run`.

    :param consent: Is also called with `options.yes` and for a dry run, to say it; its answer then does not count.
    :raises FormatError: When the file is missing or damaged.
    :raises UsageError: When a name is malformed, or nobody agreed to the texts.
    :raises HubError: When the hub cannot be reached or refuses.
    """
    if not is_repo(options.repo):
        raise UsageError(f"'{options.repo}' is no id of a repository.", "Pass one as user/name.")
    if options.revision is not None and not is_revision(options.revision):
        raise UsageError(f"'{options.revision}' is no name of a branch.", "Pass another --revision.")
    if not options.card:
        why = "no card is uploaded"
        options.refuse_given(dict.fromkeys(("license", "language", "overwrite"), why))
    shared = SharedFile.read(options.file)
    files, card = {shared.name: shared.data}, None
    if options.card:
        card = adapter_card(
            shared,
            options.repo,
            revision=options.revision,
            licence=options.license,
            languages=options.language,
        )
        files = {CARD: card.encode()} | files
    if shared.warning:
        agreed = consent(shared.warning)
        if not (agreed or options.yes or options.dry_run):
            raise UsageError(f"{shared.warning}.", "Nothing was uploaded; add --yes to agree.")
    done = None
    if not options.dry_run:
        done = upload(
            options.repo,
            files,
            keep=None if options.overwrite else CARD,
            message=options.message or f"Upload {shared.name} with uhl",
            revision=options.revision,
            private=options.private,
        )
    return PushReport(
        file=str(options.file),
        repo=options.repo,
        revision=options.revision,
        files={name: len(data) for name, data in files.items()},
        texts=shared.texts,
        card=card,
        url=None if done is None else done.url,
        commit=None if done is None else done.commit,
        changed=done is not None and done.changed,
        private=None if done is None else done.private,
    )
