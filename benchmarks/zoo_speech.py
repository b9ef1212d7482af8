"""A speech recognizer beside its dense self, on speech that espeak-ng makes of WikiText-2.

Every clip is up to about twenty seconds of sentences, read by one of eight voices. The dense model writes it
down greedily; its transcript is then the text whose nats per token, forced, are counted for every candidate.
Clips and transcripts are kept in a folder of the zoo, so that all runs hear the same.
"""

import json
import re
import subprocess
import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch
from record import DATA
from scipy.signal import resample_poly
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

CLIPS, QUICK_CLIPS, TO_CALIBRATE = 16, 3, 128
_WORDS_OF_A_CLIP, _MOST_TOKENS = 42, 160
# <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>; <|endoftext|>; " ", which opens no transcript.
_PROMPT, _END, _BLANK = [50258, 50259, 50359, 50363], 50257, 220
_VOICES = ("en-us", "en-us+f2", "en-gb", "en-us+m3", "en-gb+f4", "en-us+m7", "en-gb-x-rp", "en-us+f5")
_SPEEDS = (150, 165, 140)
_FILES = {
    "dev": DATA / "text" / "wikitext-2" / "valid.txt",
    "test": DATA / "text" / "wikitext-2" / "test.txt",
    "calibrate": DATA / "text" / "calib" / "wiki.txt",
}


def sentences_to_say(split: str) -> list[str]:
    """Plain sentences of 8 to 20 words in the order of the file, without <unk> or foreign letters."""
    text = _FILES[split].read_text(encoding="utf-8")
    for written, said in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" 's", "'s"), (" . ", ".\n")):
        text = text.replace(written, said)
    found = [
        re.sub(r" ([,.;:!?)])", r"\1", line).strip() for line in re.sub(r"(\.) ", r"\1\n", text).splitlines()
    ]
    return [s for s in found if re.fullmatch(r"[A-Z][A-Za-z0-9 ,.'-]+\.", s) and 8 <= len(s.split()) <= 20]


def texts(split: str, clips: int) -> list[str]:
    """What each clip says: sentences that are spread over the file, up to so many words."""
    spread = sentences_to_say(split)
    spread = spread[:: max(1, len(spread) // (4 * clips))]
    found, clip = [], ""
    for sentence in spread:
        if clip and len((clip + " " + sentence).split()) > _WORDS_OF_A_CLIP:
            found, clip = [*found, clip], ""
        clip = f"{clip} {sentence}".strip()
    return found[:clips]


def speech(folder: Path, split: str, clips: int = CLIPS) -> list[np.ndarray]:
    """Samples of every clip at 16 kHz, float32; what is not there is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{i:03}.wav" for i in range(clips)]
    if not all(path.exists() for path in paths):
        for i, (path, text) in enumerate(zip(paths, texts(split, clips), strict=True)):
            _say(text, path, _VOICES[i % len(_VOICES)], _SPEEDS[i % len(_SPEEDS)])
    return [_samples(path) for path in paths]


def _say(text: str, path: Path, voice: str, speed: int) -> None:
    """A WAV file of 16 kHz; espeak-ng's own has 22,050 Hz."""
    raw = path.with_suffix(".raw.wav")
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(raw), text]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError as error:
        raise SystemExit(
            "zoo: whisper-base needs espeak-ng for its speech: apt-get install espeak-ng"
        ) from error
    heard = resample_poly(_samples(raw), 320, 441)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((heard.clip(-1, 1) * 32767).astype("<i2").tobytes())
    raw.unlink()


def _samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


@cache
def _features(folder: Path, split: str, clips: int) -> Tensor:
    """Log-mel spectra [clips, 80, 3000]."""
    heard = speech(folder, split, CLIPS)[:clips]
    return WhisperFeatureExtractor()(heard, sampling_rate=16_000, return_tensors="pt").input_features


@torch.inference_mode()
def _greedy(model: nn.Module, features: Tensor) -> list[int]:
    """The likeliest token after the other, without the prompt, up to and with the end."""
    encoded, said = model.get_encoder()(features[None]), []  # pyright: ignore[reportCallIssue]
    while len(said) < _MOST_TOKENS and said[-1:] != [_END]:
        ids = torch.tensor([_PROMPT + said])
        scores = model(encoder_outputs=encoded, decoder_input_ids=ids).logits[0, -1]
        if not said:
            scores[[_BLANK, _END]] = -torch.inf
        said.append(int(scores.argmax()))
    return said


def transcripts(dense: nn.Module, cache_folder: Path, split: str, clips: int) -> list[list[int]]:
    """The dense model's greedy transcripts, kept once they are made."""
    path = cache_folder / f"{split}-transcripts.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if len(known) < clips:
        features = _features(cache_folder, split, clips)
        known += [_greedy(dense, features[i]) for i in range(len(known), clips)]
        path.write_text(json.dumps(known))
    return known[:clips]


@torch.inference_mode()
def _log_probabilities(model: nn.Module, features: Tensor, said: list[int]) -> Tensor:
    """Of the tokens of a transcript, each after the true ones before it: [len(said), vocabulary]."""
    ids = torch.tensor([_PROMPT + said[:-1]])
    logits = model(input_features=features[None], decoder_input_ids=ids).logits
    return torch.log_softmax(logits[0, len(_PROMPT) - 1 :].float(), 1)


@cache
def _dense_log_probabilities(dense: nn.Module, cache_folder: Path, split: str, clips: int) -> list[Tensor]:
    features, said = _features(cache_folder, split, clips), transcripts(dense, cache_folder, split, clips)
    return [_log_probabilities(dense, *pair) for pair in zip(features, said, strict=True)]


def measure(
    model: nn.Module, dense: nn.Module, folder: Path, split: str, quick: bool, *, cache_folder: Path
) -> dict[str, float]:
    """Nats per token of the dense transcripts, over dense's own, KL, and agreement of the likeliest token."""
    clips = QUICK_CLIPS if quick else CLIPS
    features, said = _features(cache_folder, split, clips), transcripts(dense, cache_folder, split, clips)
    dense_nats = nats = kl = 0.0
    same = n = 0
    for clip, text, there in zip(
        features, said, _dense_log_probabilities(dense, cache_folder, split, clips), strict=True
    ):
        here = there if model is dense else _log_probabilities(model, clip, text)
        at = torch.arange(len(text)), torch.tensor(text)
        nats, dense_nats = nats - float(here[at].sum()), dense_nats - float(there[at].sum())
        kl += float((there.exp() * (there - here)).sum())
        same, n = same + int((there.argmax(1) == here.argmax(1)).sum()), n + len(text)
    return {"nats": nats / n, "nats_over": (nats - dense_nats) / n, "kl": kl / n, "agreement": 100 * same / n}
