"""``fingpt chat``: a conversation with a model in the terminal, or over lines of a pipe."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fingpt_lightning.deploy.chat import Chat
from fingpt_lightning.deploy.loading import load_with_adapters
from fingpt_lightning.deploy.sampling import sampling_of
from fingpt_lightning.files import JSON_LINES, to_json, write_whole
from fingpt_lightning.terminal.messages import nearest, wrong_ending

_COMMANDS = {
    "/reset": "forgets the conversation; the system text stays",
    "/system TEXT": "what the conversation begins with; without a text, nothing",
    "/save FILE": "the conversation as a line of .jsonl that fingpt fit trains on",
    "/help": "this list",
    "/quit": "ends, as Ctrl-D does",
}
_HELP = "\n".join(
    [
        *(f"{name:14} {purpose}" for name, purpose in _COMMANDS.items()),
        "Ctrl-C         ends an answer: what is written of it is kept",
        "//...          a message that begins with one slash",
    ]
)
# Of a terminal: a model may write what moves its cursor or sets its title.
_CONTROLS = (code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
_HARMLESS = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")


def run(options: argparse.Namespace) -> None:
    """Answers messages until there are no more.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A setting, the model or, from a pipe, a message is not valid.
        OSError: A path does not exist.
    """
    sampling = sampling_of(options)
    try:
        _check_encoding(options.system or "")
    except ValueError as error:
        raise ValueError(f"system: {error}") from None
    model = load_with_adapters(options)
    chat = Chat(
        model.network,
        model.tokenizer,
        context=options.context,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    chat.system = options.system
    form = "a chat as the chat template renders it"
    if chat.template is None:
        form = "plain text, for no chat template is in use: it goes on from what you write"
    _tell(f"{model.loaded.description}: {form}; /help lists the commands")
    if model.remark:
        _tell(model.remark)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _talk(chat)
    else:
        _answer_lines(chat)


def _talk(chat: Chat) -> None:
    """Messages of a person at a terminal: mistakes are told, and the conversation goes on."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401 - lines can be edited and called back
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            _tell(f"not UTF-8 ({error.reason})")
            continue
        except KeyboardInterrupt:
            print()
            _tell("Ctrl-D or /quit ends")
            continue
        try:
            if not _take(chat, line, is_terminal=True):
                return
        except KeyboardInterrupt:
            print()
            _tell("interrupted")
        except (ValueError, OSError, FloatingPointError) as error:
            _tell(str(error))


def _answer_lines(chat: Chat) -> None:
    """Messages of a pipe, one per line: the first mistake ends the command."""
    for number, line in _lines():
        try:
            if not _take(chat, line, is_terminal=False):
                return
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error


def _lines() -> Iterator[tuple[int, str]]:
    number = 0
    while True:
        number += 1
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number}: not UTF-8 ({error.reason})") from None
        if not line:
            return
        yield number, line.removesuffix("\n")


def _take(chat: Chat, line: str, *, is_terminal: bool) -> bool:
    """Does what a line says; whether the conversation goes on.

    Raises:
        ValueError: The line is not UTF-8 or no command, or the message cannot be answered.
        OSError: A file cannot be written.
    """
    _check_encoding(line)
    if not line.strip():
        return True
    if line.startswith("/") and not line.startswith("//"):
        return _obey(chat, line.strip())
    message = line[1:] if line.startswith("//") else line
    num_left_out = chat.num_left_out

    def show(piece: str) -> None:
        nonlocal num_left_out
        if chat.num_left_out > num_left_out:
            num_left_out = chat.num_left_out
            _tell(
                f"the first {num_left_out} of {len(chat.exchanges)} exchanges are left out: they"
                f" do not fit the context of {chat.context} tokens"
            )
        sys.stdout.write(piece.translate(_HARMLESS) if is_terminal else piece)
        sys.stdout.flush()

    chat.ask(message, show)
    print(flush=True)
    return True


def _check_encoding(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # in the C locale Python reads other bytes as lone surrogates
        raise ValueError("not UTF-8") from None


def _obey(chat: Chat, line: str) -> bool:
    """Runs a command; whether the conversation goes on."""
    command, _, text = line.partition(" ")
    text = text.strip()
    known = {name.partition(" ")[0]: name for name in _COMMANDS}
    if command not in known:
        raise ValueError(f"{command} is none of {', '.join(known)}{nearest(command, known)}")
    if text and " " not in known[command]:
        raise ValueError(f"{command} takes no text")
    if command == "/quit":
        return False
    if command == "/help":
        _tell(_HELP)
    elif command == "/reset":
        chat.reset()
        _tell("forgotten")
    elif command == "/system":
        chat.system = text or None
        _tell(f"system: {text}" if text else "no system text")
    else:
        _save(chat, text)
    return True


def _save(chat: Chat, name: str) -> None:
    if not name:
        raise ValueError("/save needs the name of a file")
    file = Path(name).expanduser()
    if file.suffix != JSON_LINES:
        raise ValueError(f"/save {wrong_ending(file, [JSON_LINES])}")
    if not chat.exchanges:
        raise ValueError("there is nothing to save yet")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"/save {file}: there is no folder {file.parent}")
    if file.exists():
        raise FileExistsError(f"/save {file}: it is there already; give another name")
    row = {"messages": [turn._asdict() for turn in chat.turns()]}
    write_whole(file, to_json(row, ensure_ascii=False) + "\n")
    _tell(f"{file}: {len(chat.exchanges)} exchanges")


def _tell(text: str) -> None:
    """Remarks go to standard error: standard output holds the answers alone."""
    print(text, file=sys.stderr, flush=True)
