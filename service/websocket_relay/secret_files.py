"""Read secrets from files. Knows no setting."""

from pathlib import Path

from websocket_relay.outcomes import RelayError

MAX_BYTES = 65_536


class SecretFileError(RelayError):
    """A file contains no usable secret. The message names the file and has one line."""


def read_secret(file: str) -> str:
    """Return the text of a file, without the newline at its end.

    Raises:
        SecretFileError: the file can't be read, is empty, or is no text of at most 64 KiB.
    """
    if not file.isprintable():  # for example the secret itself
        raise SecretFileError("the value (not shown) is not the path of a file")
    try:
        if not Path(file).is_file():  # opening a FIFO, for example, would block
            raise SecretFileError(f"{file or repr(file)}: no such file")
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as error:
        raise SecretFileError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecretFileError(f"{file}: not a text in UTF-8") from None
    if not text or len(content) > MAX_BYTES:
        raise SecretFileError(f"{file}: {'longer than 64 KiB' if text else 'empty'}")
    return text
