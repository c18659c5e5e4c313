"""An emulation of SIMA's released loop: what it computes for a pair, written anew.

One pair at a time; [prompt | chosen] and [prompt | rejected] as two rows, the image encoded for each; logits of
the whole vocabulary at every position; the reference computed again in every step, by the model with its adapters
off; and the rejected response scored by the token that the model itself finds likeliest (the second likeliest
where that is the response's own), which is not DPO.

Left out because it would only slow it down: adapters on the vision tower, where they do nothing. An update is
taken after as many pairs as the others take, which is what its eight processes with one pair each came to.

Dimensions: W = 2 rows (chosen, rejected), T padded tokens a row, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tuning.shapes import BETA, LEARNING_RATE, MAX_TOKENS, Work
from benchmarks.tuning.trial import Clock
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, read_pairs
from sima_ray.tuning.forward import pad_rows
from sima_ray.tuning.lora import add_lora, trainable
from sima_ray.tuning.schedule import order


def train(work: Work, clock: Clock) -> None:
    """Tune for all epochs."""
    config = work.training()
    model, encoder = load(work)
    pairs = read_pairs(work.pairs)
    adapters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(adapters, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    clock.ready(model)
    pair_loss(model, encoder.encode(pairs[0])).backward()  # the others are warm too
    optimizer.zero_grad()
    for epoch in range(work.epochs):
        with clock.lap("epoch"):
            for number, row in enumerate(order(len(pairs), work.seed, epoch), start=1):
                loss = pair_loss(model, encoder.encode(pairs[row]))
                (loss / config.batch_size).backward()
                loss.item()  # logged
                if number % config.batch_size == 0 or number == len(pairs):
                    torch.nn.utils.clip_grad_norm_(adapters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()


def load(work: Work) -> tuple[Any, PairEncoder]:
    """The policy with fresh adapters, and what turns pairs into tokens."""
    from sima_ray.policy.checkpoint import load_policy

    policy, processor = load_policy(work.model, work.shapes.dtype)
    model: Any = add_lora(policy, work.shapes.lora, work.seed)
    return model.to(work.device), PairEncoder(processor, work.images, MAX_TOKENS)


def pair_loss(model: Any, pair: EncodedPair, *, true_dpo: bool = False) -> Tensor:
    """The loss of one pair; differentiable.

    Args:
        model: With adapters, which are switched off for the reference.
        pair: One.
        true_dpo: Score the rejected response by its own tokens, as DPO does.
    """
    rows = [(pair.prompt_P, pair.chosen_C), (pair.prompt_P, pair.rejected_R)]
    ids_WT, mask_WT, response_WT = (tensor.to(model.device) for tensor in pad_rows(rows))
    pixels = pair.image_inputs["pixel_values"].to(model.device, model.dtype)
    inputs = {
        "input_ids": ids_WT,
        "attention_mask": mask_WT,
        "pixel_values": torch.cat([pixels, pixels]),
        "use_cache": False,
    }
    with torch.no_grad(), model.disable_adapter():
        reference_W = row_logps(model(**inputs).logits, ids_WT, response_WT, true_dpo=true_dpo)
    policy_W = row_logps(model(**inputs).logits, ids_WT, response_WT, true_dpo=true_dpo)
    chosen, rejected = policy_W - reference_W
    return -F.logsigmoid(BETA * (chosen - rejected))


def row_logps(logits_WTV: Tensor, ids_WT: Tensor, response_WT: Tensor, *, true_dpo: bool) -> Tensor:
    """Sums of log-probabilities over each row's response, from the logits at all positions."""
    logits_WTV = logits_WTV[:, :-1].to(torch.promote_types(logits_WTV.dtype, torch.float32))
    labels_WT, counts_WT = ids_WT[:, 1:], response_WT[:, 1:]
    if not true_dpo:
        rejected_T = rejected_labels(logits_WTV[1], labels_WT[1])
        labels_WT = torch.stack([labels_WT[0], rejected_T])
    logps_WT = logits_WTV.log_softmax(-1).gather(2, labels_WT[..., None])[..., 0]
    return (logps_WT * counts_WT).sum(-1)


def rejected_labels(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The model's likeliest token at each position, the second likeliest where the first is the label itself."""
    best_T2 = logits_TV.detach().topk(2, dim=-1).indices
    return torch.where(best_T2[:, 0] == labels_T, best_T2[:, 1], best_T2[:, 0])
