"""Sounds → rows: wav files, one channel at the model's rate, through its feature extractor."""

import io
import json
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor
from transformers.models.auto.feature_extraction_auto import (
    FEATURE_EXTRACTOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage] (elsewhere in other versions)
)

from miracle_hub.calibrate.modality import inputs_by_name
from miracle_hub.calibrate.rows import LEAST_ROWS, Row, rows_of_batch, tokens_of
from miracle_hub.errors import DataError, SourceError

_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_WAVEFORM_SECONDS = 5.0  # of a row of a waveform, where the model takes any length: a choice
_LEAST_SECONDS = 0.1
_INTEGERS = {1: np.uint8, 2: np.dtype("<i2"), 4: np.dtype("<i4")}


@dataclass(frozen=True)
class Sound:
    """One channel of samples between −1 and 1."""

    samples: np.ndarray
    rate: int

    @classmethod
    def of(cls, value: Any, where: str) -> "Sound":
        """A value of a column of sounds of `datasets`, decoded or not, or a pair of samples and rate.

        Raises:
            DataError: it is none of these.
        """
        if isinstance(value, dict) and value.get("array") is not None:
            return cls(np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"]))
        if isinstance(value, dict) and value.get("bytes") is not None:
            return _wav(io.BytesIO(value["bytes"]), where)
        if isinstance(value, dict) and value.get("path"):
            return read_sound(Path(value["path"]))
        if isinstance(value, tuple) and len(value) == 2:
            return cls(np.asarray(value[0], dtype=np.float32), int(value[1]))
        raise DataError(
            f"{where}: expected a sound with its array and sampling_rate, or a pair of the two, found "
            f"{type(value).__name__}; give one of these"
        )

    def at(self, rate: int) -> np.ndarray:
        """The samples at another rate, by their spectrum."""
        if rate == self.rate:
            return self.samples
        n = round(len(self.samples) * rate / self.rate)
        return (np.fft.irfft(np.fft.rfft(self.samples), n) * (n / len(self.samples))).astype(np.float32)


def sound_paths(data: Path) -> list[Path]:
    """The wav files of a folder in order of their names, or the one that is given.

    Raises:
        DataError: there is none.
    """
    if data.is_dir():
        paths = sorted(path for path in data.rglob("*") if path.suffix.lower() == ".wav")
    else:
        paths = [data] if data.suffix.lower() == ".wav" else []
    if not paths:
        raise DataError(
            f"{data}: expected sounds (a wav file, or a folder of them), found none; convert other "
            "formats to wav, or leave them to the model (--calibrate self)"
        )
    return paths


def read_sound(path: Path) -> Sound:
    """
    Raises:
        DataError: it is no wav of whole numbers.
    """
    try:
        with path.open("rb") as stream:
            return _wav(stream, str(path))
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, found {error}; look there") from error


def _wav(stream: Any, where: str) -> Sound:
    """
    Raises:
        DataError: it is no wav of whole numbers, or empty.
    """
    try:
        with wave.open(stream) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(
            f"{where}: expected a wav of whole numbers (PCM), found {error}; convert it to 16 bits"
        ) from error
    if rate < 1 or len(content) % (width * channels):
        raise DataError(
            f"{where}: expected whole samples at a rate above 0, found {len(content)} bytes, {width} for "
            f"each of {channels} channels at {rate} Hz; the file is damaged: remove it, or save it anew"
        )
    if width == 3:
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        content, width = padded.tobytes(), 4
    found = np.frombuffer(content, _INTEGERS[width]).astype(np.float32)
    found = (found - 128) / 128 if width == 1 else found / 2 ** (8 * width - 1)
    if not len(found):
        raise DataError(f"{where}: expected a sound, found one without samples; remove it")
    return Sound(found.reshape(-1, channels).mean(1), rate)


def read_extractor(model: Any, folder: Path) -> Any:
    """The feature extractor beside a model, or that of its class, for the model's sizes.

    Raises:
        SourceError: there is neither.
    """
    if any((folder / name).is_file() for name in _CONFIGS):
        try:
            return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError, json.JSONDecodeError) as error:
            said = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{folder}: expected a feature extractor beside the model, found {said}; save it there with "
                "processor.save_pretrained"
            ) from error
    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(model.config.model_type)
    if name is None or not hasattr(transformers, name):
        raise SourceError(
            f"{folder}: expected a feature extractor beside the model, found none of {', '.join(_CONFIGS)}; "
            "save it there with processor.save_pretrained"
        )
    mels = getattr(model.config, "num_mel_bins", None)
    return getattr(transformers, name)(**({} if mels is None else {"feature_size": mels}))


def sound_rows(model: Any, folder: Path, sounds: Iterable[Sound], wanted: int) -> list[Row]:
    """What a model takes of sounds, cut into pieces of its length, until there are `wanted` tokens.

    Raises:
        DataError: they are too short, or not finite. SourceError: there is no feature extractor.
    """
    extractor, rows, total = read_extractor(model, folder), [], 0
    for piece in _pieces(sounds, extractor.sampling_rate, getattr(extractor, "chunk_length", None)):
        found = dict(extractor(piece, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        rows += rows_of_batch({n: x for n, x in found.items() if n in inputs_by_name(model)})
        total += tokens_of(rows[-1])
        if total >= wanted and len(rows) >= LEAST_ROWS:
            break
    return rows


def _pieces(sounds: Iterable[Sound], rate: int, seconds: float | None) -> Iterator[np.ndarray]:
    """
    Args:
        seconds: that the extractor makes of all sounds; None where it takes any length, and pads none.

    Raises:
        DataError: none is long enough, or one is not finite.
    """
    length = round((seconds or _WAVEFORM_SECONDS) * rate)
    least = round(_LEAST_SECONDS * rate) if seconds else length
    longest, count = 0, 0
    for number, sound in enumerate(sounds):
        samples = sound.at(rate)
        if not np.isfinite(samples).all():
            raise DataError(
                f"data: sound {number}: expected finite samples, found NaN or infinite ones; repair it"
            )
        longest = max(longest, len(samples))
        for start in range(0, len(samples), length):
            piece = samples[start : start + length]
            if len(piece) >= least:
                count += 1
                yield piece
    if not count:
        raise DataError(
            f"data: expected a sound of {least / rate:g} seconds at least, found none above "
            f"{longest / rate:.2f}; give longer ones"
        )


def waveform(samples: torch.Tensor, rate: int) -> Sound:
    """A sound of samples in a tensor."""
    return Sound(samples.numpy().astype(np.float32), rate)
