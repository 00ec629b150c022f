"""``pcb-peft push``: a merged adapter, or a folded model, sent to the Hugging Face Hub."""

import argparse
import dataclasses

from pcb_peft.commands.command import Answer, Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="directory of an adapter or a folded model")
    parser.add_argument("repository", help="name on the Hub, such as user/name")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--message", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; say what would be")


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.reporting.publish import publish

    publication = publish(
        parsed.directory,
        parsed.repository,
        private=parsed.private,
        revision=parsed.revision,
        message=parsed.message,
        dry_run=parsed.dry_run,
    )
    return Answer(str(publication), dataclasses.asdict(publication), essential=parsed.dry_run)


COMMAND = Command(
    "push",
    "Send a merged adapter or a folded model to the Hugging Face Hub",
    "pcb-peft push merged me/merged --dry-run\npcb-peft push merged me/merged --private",
    _add_arguments,
    _run,
)
