"""Tokenizers with more special tokens, and archives whose embedding has a row for each."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.conversion.convert import Target, to_nemo
from nemo_vlm.conversion.jobs import with_tokenizer
from nemo_vlm.conversion.settings import merged
from nemo_vlm.conversion.tokenizer_files import (
    ADDED,
    CONFIG,
    DECODER,
    FAST,
    PIECES,
    TokenizerFacts,
    parse,
    read_json,
    read_tokenizer,
)
from nemo_vlm.data.tokenizer import open_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import folder_written_whole, written_whole
from nemo_vlm.formats.grown import Grown
from nemo_vlm.formats.store import Folder, Span
from nemo_vlm.mapping import check
from nemo_vlm.models.base import family
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain

EXTRA = tuple(f"<extra_id_{number}>" for number in range(8))
USER_DEFINED = 4  # SentencePiece's type of a piece that stands whole in a text; 3, control, is never read from text

log = logging.getLogger(__name__)


def add_special_tokens(given: Path, output: Path, tokens: Iterable[str]) -> TokenizerFacts:
    """Write the tokenizer with the tokens, and say which special tokens it has then; those that it has are kept.

    Args:
        given: a SentencePiece model, or the directory of a Hugging Face tokenizer.
        output: the same of the result; it appears whole or not at all.
    Raises:
        ConfigError: there is no tokenizer, it is damaged, or the output would replace something else.
    """
    files = tokenizer_files(given, "--input")
    before = read_tokenizer(files)
    assert before is not None
    wanted = check_tokens(tokens)
    missing = [token for token in wanted if token not in before.ids]
    if given.is_dir():
        write_folder(output, {name: span.bytes() for name, span in files.items()} | extended(files, before, missing))
    else:
        check_file(output)
        with written_whole(output, "wb") as file:
            file.write(with_pieces(files[PIECES], missing))
    after = read_tokenizer(tokenizer_files(output, "--output"))
    assert after is not None and before.ids.items() <= after.ids.items() and set(wanted) <= after.ids.keys()
    report(after, wanted, missing, output)
    return after


def tokenizer_files(path: Path, key: str) -> dict[str, Span]:
    """The files of a tokenizer.

    Raises:
        ConfigError: there is none.
    """
    if path.is_file():
        return {PIECES: Folder(path.parent).span(path.name)}
    files = companions(Folder(path)) if path.is_dir() else {}
    if not {FAST, PIECES} & files.keys():
        raise ConfigError(
            f"{key}={path}: neither a SentencePiece model ({PIECES}) nor a directory with {FAST} or {PIECES}"
        )
    return files


def check_tokens(tokens: Iterable[str]) -> list[str]:
    """Each once.

    Raises:
        ConfigError: one is no token.
    """
    wanted = list(dict.fromkeys(tokens))
    for token in wanted:
        if not token.strip() or token != token.strip():
            raise ConfigError(f"--tokens={token!r}: a token is not empty and has no space around it")
    return wanted


def check_file(output: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"--output={output}: is a directory; a SentencePiece model is a file")
    output.parent.mkdir(parents=True, exist_ok=True)


def write_folder(output: Path, contents: Mapping[str, bytes]) -> None:
    """Raises ConfigError where the output holds more than a tokenizer, which would be lost."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={output}: is a file; a Hugging Face tokenizer is a directory")
    if output.is_dir() and (others := Folder(output).names() - companions(Folder(output)).keys()):
        raise ConfigError(f"--output={output}: holds other files, as {min(others)}; give a new directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(output) as folder:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def extended(files: Mapping[str, Span], before: TokenizerFacts, tokens: list[str]) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer that change.

    A SentencePiece model beside a tokenizer.json stays what it was, as in transformers, whose added tokens are not its.
    """
    if FAST in files:
        fast, ids = with_added(files[FAST], tokens)
        return {FAST: fast, **beside(files, ids)}
    if before.size == len(parse(files[PIECES]).pieces):
        return {PIECES: with_pieces(files[PIECES], tokens)}
    return beside(files, {token: before.size + number for number, token in enumerate(tokens)})


def with_added(file: Span, tokens: list[str]) -> tuple[bytes, dict[str, int]]:
    """A tokenizer.json with the tokens added, and their ids."""
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(file.bytes().decode())
    except Exception as error:  # it raises no other class
        raise ConfigError(f"{file}: damaged ({error})") from None
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return tokenizer.to_str(pretty=True).encode(), {token: tokenizer.token_to_id(token) for token in tokens}


def beside(files: Mapping[str, Span], ids: dict[str, int]) -> dict[str, bytes]:
    """The files that list added tokens, where there are such, with more of them."""
    changed: dict[str, Any] = {}
    if DECODER in (config := read_json(files, CONFIG)):
        entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        added = {str(number): {"content": token, **entry} for token, number in ids.items()}
        changed[CONFIG] = config | {DECODER: config[DECODER] | added}
    if ADDED in files:
        changed[ADDED] = read_json(files, ADDED) | ids
    return {name: json.dumps(tree, indent=2, ensure_ascii=False).encode() for name, tree in changed.items()}


def with_pieces(file: Span, tokens: list[str]) -> bytes:
    """A SentencePiece model with the tokens behind its pieces, so that those keep their ids."""
    model = parse(file)
    for token in tokens:
        model.pieces.append(model.SentencePiece(piece=token, score=0.0, type=USER_DEFINED))
    return model.SerializeToString()


def report(facts: TokenizerFacts, wanted: list[str], added: list[str], output: Path) -> None:
    ids = facts.special | {token: facts.ids[token] for token in wanted}
    for token, number in sorted(ids.items(), key=lambda item: item[1]):
        note = "  added" if token in added else "  was there, kept" if token in wanted else ""
        log.info("%8d  %s%s", number, token, note)
    log.info("wrote %s: %s tokens, %d of them added", output, f"{facts.size:,}", len(added))


def resize(source: Source, tokenizer: Path, output: Path) -> None:
    """Write the archive with that tokenizer, and with as many rows for tokens as it needs; old rows stay as they are.

    Args:
        tokenizer: what add_special_tokens has written.
    Raises:
        ConfigError: it is no extension of the archive's own, or the archive is damaged.
    """
    made = replaced_tokenizer(source, tokenizer)
    old, new = source.model, settled(made, tokenizer)
    rules = family(source.family, "mapping").rules
    shapes = {rule.ours: rule.shape for rule in rules(old)}
    check(source.reader, shapes)
    grown = {rule.ours: rule.shape for rule in rules(new) if rule.shape != shapes[rule.ours]}
    tree = merged(source.tree, changes(plain(old), plain(new)))
    if grown:
        log.info("%s rows grow to %s; new ones are the mean of the old", f"{old.vocab_size:,}", f"{new.vocab_size:,}")
    else:
        log.info("the embedding has %s rows, which is enough: no weight changes", f"{old.vocab_size:,}")
    to_nemo(replace(made, tree=tree, reader=Grown(source.reader, grown)), Target(output))


def replaced_tokenizer(source: Source, tokenizer: Path) -> Source:
    """The source with another tokenizer, which must be its own with more tokens."""
    if tokenizer.is_dir():
        made = with_tokenizer(source, str(tokenizer), "--output")
    else:
        kept = {name: span for name, span in source.files.items() if name not in (FAST, ADDED)}
        made = replace(source, files=kept | tokenizer_files(tokenizer, "--output"))
    before, after = read_tokenizer(source.files), read_tokenizer(made.files)
    if before is None:
        return made
    assert after is not None
    old_tokens = {number: token for token, number in before.ids.items()}
    for token, number in after.ids.items():
        here = before.ids.get(token)
        if here not in (None, number) or here is None and number in old_tokens:
            there = f"has '{old_tokens[number]}' there" if here is None else f"has it at {here}"
            raise ConfigError(f"--output={tokenizer}: '{token}' has the id {number}, {source} {there}")
    if lost := sorted(before.ids.keys() - after.ids.keys()):
        raise ConfigError(f"--output={tokenizer}: lacks tokens of {source}, as '{lost[0]}'; extend that tokenizer")
    return made


def settled(source: Source, called: Path) -> LanguageConfig:
    """The source's architecture with room for its tokenizer, and with what that decides: the image token's id."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(str(source.save_files(Path(scratch))), str(called))
    rows = max(source.model.vocab_size, len(tokenizer))  # type: ignore[type-var]
    return family(source.family, "processor").settle(replace(source.model, vocab_size=rows), tokenizer)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tree differs in another with the same keys."""
    found = {}
    for key, value in new.items():
        if isinstance(value, dict):
            if inner := changes(old[key], value):
                found[key] = inner
        elif value != old[key]:
            found[key] = value
    return found
