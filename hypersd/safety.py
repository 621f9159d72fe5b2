"""What a public app refuses to draw, and what it does not show: a list of words, and a network that looks.

On for every base model but the embedded one wherever others can reach the app: on a Space (SPACE_ID), behind a share
link (GRADIO_SHARE), on an address that is not this machine's own (GRADIO_SERVER_NAME), or where HYPERSD_PUBLIC=1 says
so. A local app, whose only visitor chose the model and answers for it, is not filtered unless HYPERSD_SAFETY=on. The
emoji model needs none: it has seen nothing but emoji artwork, single objects on white, and draws nothing else.

    HYPERSD_SAFETY=on        filter here too
    HYPERSD_SAFETY=off       do not filter, whoever may come; the log says so at the start
    HYPERSD_SAFETY=FOLDER    filter, by the copy of the checker in this folder: config.json, model.safetensors

Everything that is drawn for a screen, the study, /compare, /sweep or MCP passes `Filter` in `engine.Engine`, the
pictures of the single steps too, and it fails closed: where the checker cannot be had or fails, nothing is shown.
Looking at a picture takes 2.4 s of one core without a GPU. What the command line draws is not filtered.

The network is Stable Diffusion's own safety checker (CompVis/stable-diffusion-safety-checker; described in
arXiv:2210.04610), a CLIP ViT-L/14 that compares a picture with 17 hidden concepts, all of them sexual, and is stricter
where one of 3 others, of children, is near. Its weights are read as safetensors from the repository of Stable
Diffusion 1.5 and must be those with `SHA256`; a folder is believed.

Limits: neither part knows violence, hatred, likenesses or brands beyond a few words of gore. The words are English and
few; whoever wants around them gets around them, and then meets the network, which misses things and sometimes holds
back what is harmless. Who opens a model to the world still has to look at what it draws.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd.hub import again, digest, fetched
from hypersd.records import InputError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WEIGHTS = "model.fp16.safetensors"
SHA256 = "08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511"
BATCH = 8  # pictures looked at together

HELD = "The safety filter does not show this picture, which may be a mistake: try another seed or other words."
UNSEEN = (
    "The safety filter could not look at this picture, so it is not shown. "
    "Whoever runs this app finds the reason in its log."
)
MISSING = (
    "The safety filter cannot be loaded, so nothing is drawn. Whoever runs this app finds the reason in its log; "
    f"its weights (0.6 GB) are safety_checker/{WEIGHTS} of {SOURCE} on the Hugging Face hub, "
    "or a folder that HYPERSD_SAFETY names."
)


class Held(InputError):
    """A picture that is not to be shown."""


# ----------------------------------------------------------------------------------------------------------- words

REFUSED = """
    nude nudity naked nsfw topless porn porno pornographic pornography hentai erotic erotica sex sexual sexually
    intercourse orgasm masturbate masturbating masturbation blowjob handjob cumshot penis vagina vulva genital genitalia
    nipple boob tit pussy fellatio bdsm fetish rape incest bestiality loli lolicon shota shotacon
    gore beheading beheaded decapitated dismembered mutilated
"""
CHILD = """
    child children childlike kid boy girl teen teenage teenager minor toddler baby infant underage preteen schoolgirl
    schoolboy daughter
"""
SUGGESTIVE = """
    sexy seductive sensual lewd kinky provocative lingerie underwear panty panties thong bikini swimsuit bra cleavage
    undressed unclothed stripping
"""  # refused beside a child
LOOKALIKES = str.maketrans("аеорсухіѕ013457@$", "aeopcyxisoieastas")  # the first nine are Cyrillic
AGE = re.compile(r"\b(\d|1[0-7])[\s-]*(years?|yrs?|yo)\b")


def words(text: str) -> list[str]:
    """The words of a text as the lists have them: small Latin letters, one form for letters that look alike, letters
    that were set apart ("n u d e", "n.u.d.e") put together, drawn out ones shortened, no plural."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Cf")).translate(LOOKALIKES)
    plain = plain.replace("_", " ")
    plain = re.sub(r"\b\w(?:\W+\w)+\b", lambda apart: re.sub(r"\W", "", apart[0]), plain)
    plain = re.sub(r"(\w)\1{2,}", r"\1", plain)
    return [word for found in re.findall(r"\w+", plain) for word in (found, found.removesuffix("s"))]


def check_prompt(prompt: str) -> None:
    """Raises InputError, which names the words, where a prompt asks for what a public app does not draw."""
    bad, young, suggestive = (
        [w for w in words(prompt) if w in known.split()] for known in (REFUSED, CHILD, SUGGESTIVE)
    )
    if AGE.search(prompt.casefold()):
        young.append("an age")
    if not bad and young and suggestive:
        bad = [suggestive[0], young[0]]
    if bad:
        raise InputError(f"this public app does not draw {' with '.join(dict.fromkeys(bad))}; ask for something else")


# --------------------------------------------------------------------------------------------------------- pictures


class Checker:
    """The published network in memory. uint8 [n, height, width, 3] -> which of the n pictures are not to be shown."""

    def __init__(self, network: Any) -> None:
        self.network = network.requires_grad_(False).eval()

    def __call__(self, pixels: Tensor) -> list[bool]:
        """Raises ArithmeticError where the network's answer is not finite, which would compare as harmless."""
        import torch

        with torch.inference_mode():
            return [flag for part in pixels.split(BATCH) for flag in self._look(part)]

    def _look(self, pixels: Tensor) -> list[bool]:
        from torch.nn.functional import normalize

        from hypersd.scores import prepared

        own = self.network
        x = prepared(pixels.permute(0, 3, 1, 2) / 127.5 - 1, own.config.vision_config.image_size)
        seen = own.visual_projection(own.vision_model(x.to(own.device, own.dtype))[1]).float()
        if not seen.isfinite().all():
            raise ArithmeticError("the safety checker answered with numbers that are not finite")

        def above(concepts: Tensor, thresholds: Tensor) -> Tensor:
            return normalize(seen) @ normalize(concepts.float()).T - thresholds.float()  # [n, concepts]

        care = above(own.special_care_embeds, own.special_care_embeds_weights).round(decimals=3) > 0
        stricter = 0.01 * care.any(dim=1, keepdim=True)
        bad = (above(own.concept_embeds, own.concept_embeds_weights) + stricter).round(decimals=3) > 0
        flags: list[bool] = bad.any(dim=1).tolist()
        return flags


def load(folder: Path | None = None, device: str = "cpu") -> Checker:
    """The checker of a folder, or of the hub where none is given; in half precision on a GPU.

    Raises:
        Exception: anything; it cannot be had, is damaged or lacks a tensor, in whose place would be random numbers.
    """
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = folder or _fetched()
    whole = (folder / "model.safetensors").is_file()
    network, report = StableDiffusionSafetyChecker.from_pretrained(
        folder, use_safetensors=True, variant=None if whole else "fp16", local_files_only=True,
        dtype=torch.float32 if torch.device(device).type == "cpu" else torch.float16, output_loading_info=True,
    )  # fmt: skip
    if lost := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise InputError(f"the safety checker in {folder} lacks {len(lost)} tensors such as {lost[0]}")
    return Checker(network.to(device))


def _fetched() -> Path:
    """Folder of the hub's checker, in the hub's cache; its weights are the published ones."""
    paths = [f"safety_checker/{name}" for name in ("config.json", WEIGHTS)]
    weights = fetched(SOURCE, paths, "name the folder of a copy in HYPERSD_SAFETY", "the safety checker") / paths[1]
    if digest(weights) != SHA256:
        raise InputError(f"{weights} is not the safety checker that was published; {again(weights)}")
    return weights.parent


class Filter:
    """What stands between drawing and showing. Any fault in it is an InputError, so nothing is shown.

    Args:
        load: returns a `Checker`; called before the first drawing, again only after it failed.
    """

    def __init__(self, load: Callable[[], Callable[[Tensor], Sequence[bool]]]) -> None:
        self._load = load
        self._checker: Callable[[Tensor], Sequence[bool]] | None = None

    @property
    def ready(self) -> bool:
        return self._checker is not None

    def check(self, prompt: str) -> None:
        """Raises InputError where the prompt asks for what a public app does not draw."""
        check_prompt(prompt)

    def prepare(self) -> None:
        """Load the checker where it is not there yet. Raises InputError if it cannot be had."""
        if self._checker is None:
            try:
                self._checker = self._load()
            except Exception as problem:
                log.exception("the safety filter cannot be loaded")
                raise InputError(MISSING) from problem

    def look(self, pictures: Sequence[bytes], width: int, height: int) -> None:
        """Raises InputError unless the checker has seen all of these RGB pictures; Held if it flags any."""
        import torch

        self.prepare()
        assert self._checker
        try:
            pixels = torch.frombuffer(bytearray().join(pictures), dtype=torch.uint8)
            flags = list(self._checker(pixels.view(len(pictures), height, width, 3)))
            if len(flags) != len(pictures):
                raise RuntimeError(f"the safety checker saw {len(flags)} of {len(pictures)} pictures")
        except Exception as problem:
            log.exception("the safety filter failed")
            raise InputError(UNSEEN) from problem
        if any(flags):
            raise Held(HELD)


# ------------------------------------------------------------------------------------------------------ where it is on


def is_public(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether others than the person at this machine can reach the app."""
    if any(environment.get(name, "").lower() in ("1", "true") for name in ("HYPERSD_PUBLIC", "GRADIO_SHARE")):
        return True
    own = environment.get("GRADIO_SERVER_NAME", "localhost") in ("localhost", "127.0.0.1", "::1")
    return bool(environment.get("SPACE_ID")) or not own


def of(backbone: str, device: Callable[[], str], environment: Mapping[str, str] = os.environ) -> Filter | None:
    """The filter of an app that draws with this backbone, or None where there is none; the log says which.

    Args:
        device: as `backbone.best_device`; asked when the checker is loaded.
    """
    said = environment.get("HYPERSD_SAFETY", "")
    if said.lower() == "off":
        log.warning("the safety filter is off: HYPERSD_SAFETY=off")
        return None
    if not said and (backbone == "emoji" or not is_public(environment)):
        return None
    folder = None if said.lower() in ("", "on") else Path(said)
    log.warning("the safety filter is on, by %s; HYPERSD_SAFETY=off turns it off", folder or SOURCE)

    return Filter(lambda: load(folder, device()))
