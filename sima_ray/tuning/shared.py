"""Several responses to one prompt in one row: [image + prompt | response 1 | response 2 | …].

The prompt is computed once. Each response begins at the position where the prompt ends, and a mask keeps the
responses apart, so that every token sees exactly what it sees in a row of its own. `concatenated` computes the
same numbers from rows of their own.

Dimensions: B rows (one a pair), T padded tokens a row, D hidden, N response tokens and R responses of all rows
together, K tokens of a chunk, X axes of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sima_ray.loss import token_logps
from sima_ray.tuning.attention import PADDING, PROMPT, attention_mask, attention_of
from sima_ray.tuning.dataset import EncodedPair
from sima_ray.tuning.forward import Model, PairLogps, last_hidden, pad_rows
from sima_ray.tuning.last_layer import mark
from sima_ray.tuning.limits import MOST_LOGITS

Row = tuple[Tensor, Sequence[Tensor]]
"""A prompt's ids and those of its responses; none is empty."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows that share their prompt, and where to read the responses off.

    Attributes:
        ids_BT: Token ids, 0 where padded. The last token of a response is not among them: nothing follows it.
        segments_BT: PROMPT, the number of the response in its row from 1, or PADDING.
        columns_BT: Each token's place in [prompt | its response].
        plain_BT: Which of the R plain rows that is; the first of the pair's for the prompt.
        read_M: The states that predict a token, none twice, as indices into the (B · T).
        rows_N, columns_N: The state that predicts each response token. The last of a prompt predicts the first
            token of every response to it.
        labels_N: The tokens that are predicted, response by response.
        response_N: Which of the R responses each belongs to.
    """

    ids_BT: Tensor
    segments_BT: Tensor
    columns_BT: Tensor
    plain_BT: Tensor
    read_M: Tensor
    rows_N: Tensor
    columns_N: Tensor
    labels_N: Tensor
    response_N: Tensor

    def to(self, device: torch.device) -> "SharedRows":
        """The same on another device."""
        return SharedRows(*(getattr(self, name).to(device) for name in self.__slots__))


def shared(model: Model, pairs: Sequence[EncodedPair]) -> PairLogps:
    """Score pairs with one row a pair; a `PairForward`.

    Valid for models that `choose_forward` accepts.

    Raises:
        UnusablePair: An image that gives another number of features than its prompt has tokens for.
    """
    logps_N, response_N = shared_logps(model, pairs, [(p.chosen_C, p.rejected_R) for p in pairs])
    sums_R = logps_N.new_zeros(2 * len(pairs)).index_add(0, response_N, logps_N)
    return PairLogps(sums_R[0::2], sums_R[1::2])


def shared_logps(
    model: Model, pairs: Sequence[EncodedPair], responses: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The log-probability of every token of any number of responses a prompt.

    Args:
        model: Its attention must be one of `ATTENTIONS`.
        pairs: Of these, prompts and images.
        responses: One list of token ids for each of `pairs`.

    Returns:
        (logps_N, response_N), in float32 or better; responses counted through, in order.

    Raises:
        UnusablePair: An image that gives another number of features than its prompt has tokens for.
    """
    embeddings = model.get_input_embeddings().weight
    plain = [(pair.prompt_P, list(texts)) for pair, texts in zip(pairs, responses, strict=True)]
    rows = share_rows(plain).to(embeddings.device)
    positions = rows.columns_BT
    if hasattr(backbone := getattr(model, model.base_model_prefix), "get_rope_index"):
        positions = rope_positions(backbone, pairs, plain, rows)
    mask = attention_mask(rows.segments_BT, attention_of(model), embeddings.dtype)
    mark(model, mask, rows.read_M)
    hidden_BTD = last_hidden(model, pairs, rows.ids_BT, mask, positions, copies=1)
    logps_N = head_logps(
        # Past the module's hooks: ZeRO 3 asks that all workers call a module equally often.
        model.get_output_embeddings().forward,
        hidden_BTD[rows.rows_N, rows.columns_N],
        rows.labels_N,
        MOST_LOGITS // model.config.get_text_config().vocab_size,
    )
    return logps_N, rows.response_N


def share_rows(rows: Sequence[Row]) -> SharedRows:
    """Lay out one row a prompt, padded on the right."""
    length = max(len(prompt) + sum(len(r) - 1 for r in responses) for prompt, responses in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    segments_BT = torch.full_like(ids_BT, PADDING)
    columns_BT, plain_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # row, column, label, response
    for row, (prompt, responses) in enumerate(rows):
        end = len(prompt)
        ids_BT[row, :end], segments_BT[row, :end] = prompt, PROMPT
        columns_BT[row, :end], plain_BT[row] = torch.arange(end), len(states)
        for segment, response in enumerate(responses, start=1):
            start, end = end, end + len(response) - 1
            place = slice(start, end)
            ids_BT[row, place], segments_BT[row, place] = response[:-1], segment
            columns_BT[row, place] = torch.arange(len(prompt), len(prompt) + end - start)
            plain_BT[row, place] = len(states)
            column_N = torch.cat([torch.tensor([len(prompt) - 1]), torch.arange(start, end)])
            row_N = torch.full_like(response, row)
            states.append((row_N, column_N, response, torch.full_like(response, len(states))))
    row_N, column_N, *labels = map(torch.cat, zip(*states, strict=True))
    read_M = torch.unique(row_N * length + column_N)
    return SharedRows(ids_BT, segments_BT, columns_BT, plain_BT, read_M, row_N, column_N, *labels)


def rope_positions(
    backbone: Any, pairs: Sequence[EncodedPair], plain: Sequence[Row], rows: SharedRows
) -> Tensor:
    """The positions that a model with rotary positions in several axes gives to the plain rows, rearranged.

    Returns:
        (axes, B, T) for the shared rows.
    """
    flat = [(prompt, response) for prompt, responses in plain for response in responses]
    ids_RT, mask_RT, _ = pad_rows(flat)
    image_RT = (ids_RT == backbone.config.image_token_id).long()
    counts = torch.tensor([len(responses) for _, responses in plain])
    grids = {
        name: torch.cat([pair.image_inputs[name] for pair in pairs]).repeat_interleave(counts, 0)
        for name in pairs[0].image_inputs
        if name.endswith("thw")
    }
    # On the CPU, where its loops over tokens do not wait for a device.
    positions_XRT, _ = backbone.get_rope_index(
        ids_RT, mm_token_type_ids=image_RT, attention_mask=mask_RT, **grids
    )
    return positions_XRT.to(rows.ids_BT.device)[:, rows.plain_BT, rows.columns_BT]


def head_logps(head: Any, hidden_ND: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
    """Log-probability of each label, the head applied to at most `chunk` states at a time.

    Several chunks are computed again in the backward pass, so that it too holds the logits of one only.

    Args:
        head: From hidden states to logits.
        hidden_ND: The states that predict.
        labels_N: Token ids, int64.
        chunk: Raised to 1.
    """

    def score(hidden_KD: Tensor, labels_K: Tensor) -> Tensor:
        return token_logps(head(hidden_KD), labels_K)

    chunk = max(1, chunk)
    if len(labels_N) <= chunk:
        return score(hidden_ND, labels_N)
    parts = [
        checkpoint(score, hidden, labels, use_reentrant=False, preserve_rng_state=False)
        for hidden, labels in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True)
    ]
    return torch.cat(parts)  # pyright: ignore[reportArgumentType]
