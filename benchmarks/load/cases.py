"""What the critic is asked: scenes of the demo's world, and a picture of a photo's size."""

import io
import random
from functools import cache
from itertools import islice

from PIL import Image

from sima_ray.client import Case as ClientCase
from sima_ray.client.case import MAX_BODY_BYTES, request_body
from sima_ray.critic.judge import Case
from sima_ray.demo.language import QUESTIONS, write_caption
from sima_ray.demo.noise import perturbed
from sima_ray.demo.scenes import render, scenes

PHOTO = (640, 480)


def demo_cases(count: int, seed: int) -> list[Case]:
    """So many cases of the demo's world, no image twice: 96 × 96 PNGs."""
    rng = random.Random(f"load/{seed}")
    found: list[Case] = []
    for scene in islice(scenes("test", seed), count):
        file = io.BytesIO()
        render(scene).save(file, "PNG")
        texts = [write_caption(perturbed(scene.truth, errors, rng)) for errors in (1, 2)]
        truth = write_caption(scene.truth)
        found.append(Case(file.getvalue(), QUESTIONS[0], truth, (texts[0], texts[1])))
    return found


def photo_case(case: Case) -> Case:
    """The same case with the photo as its image."""
    return Case(photo(), case.question, case.ground_truth, case.responses)


@cache
def photo() -> bytes:
    """A JPEG that is as large as photos of its size are: coarse shapes under fine grain."""
    rng = random.Random(0)
    coarse = Image.frombytes("RGB", (32, 24), rng.randbytes(32 * 24 * 3)).resize(PHOTO)
    grain = Image.frombytes("RGB", PHOTO, rng.randbytes(PHOTO[0] * PHOTO[1] * 3))
    file = io.BytesIO()
    Image.blend(coarse, grain, 0.2).save(file, "JPEG", quality=90)
    return file.getvalue()


def body_of(case: Case) -> bytes:
    """The request's body."""
    sent = ClientCase(case.question, case.responses, case.image, case.ground_truth)
    return request_body(sent, MAX_BODY_BYTES)
