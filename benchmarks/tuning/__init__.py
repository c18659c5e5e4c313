"""How fast is the tuning step? DPO on a LLaVA-shaped model with random weights: three trainers, the same rows.

    ours      `sima_ray.tuning.Tuner` as it ships, without Ray: rows that share their prompt, references once
              a pair, last layer and head at response positions alone, DeepSpeed's engine
    trl       TRL's `DPOTrainer`, at its fastest setting for images (`benchmarks.tuning.by_trl` says which)
    released  an emulation of SIMA's released loop, written anew (`benchmarks.tuning.by_released`)

All begin with the same adapters. First a gate: in float64 ours must be the plain forward's and the emulation's
numbers, in float32 TRL's; if it is not, nothing is timed. Then every trainer runs in a fresh process a repeat, in
an order that turns. What a pair costs is all that happens between the moment when model, data and optimizer are
ready and the end of the last step: images read and decoded, text tokenised, the reference, forward, backward,
update. Ours is charged its reference pass; the other two compute the reference in every step. Left out is what
happens once before that moment: loading, ours' trial of its attention on one pair, and on CUDA the compilation of
it. Costs are CPU-seconds (user and system, all threads) on a CPU, and seconds of wall time on a GPU.

What arithmetic expects
-----------------------
A decoder with N parameters in its linear layers costs 2N FLOPs a token forward. LoRA leaves N frozen: the backward
pass computes gradients by activations and none by weights, so it costs another 2N (the adapters' own few per cent
left aside). Attention adds 4 · layers · width a pair of tokens that see each other, and twice that backward.
For 576 image tokens, 43 of prompt, and two responses of 125:

    plain rows    2 × 744 = 1488 tokens   forward, backward, reference in every epoch   3.0 × 1488 an epoch
    shared rows        867 tokens         forward, backward in every epoch              2.0 × 867 an epoch
                                          the reference once                            1.0 × 867

which is a factor of 2.6 for the steps alone and 2.2 for three epochs with the reference; it is then 14% of the
run. In its last layer ours computes queries, output projection and MLP for the 249 states alone that predict
something. That makes 867 tokens cost what 851 would in 32 layers (7B), and 737 in the 4 of the default shapes:
factors of 2.6 and 2.2 there, 3.0 and 2.6 here. For the plain rows come on top heads at positions that predict no
response, images encoded four times, and statistics over the vocabulary. The default shapes are no small 7B in
every way: in FLOPs of a plain row attention is 10% there (7B: 1.5%) and the head at all positions 3% (7B: 2%).

`--shapes 7b --device cuda` has the sizes of LLaVA-1.5-7B with random weights in bfloat16, and adds tokens a
second (of the plain rows, for all trainers alike) and the share of the device's dense bfloat16 peak: FLOPs as
above on the tokens that a trainer really computes, ÷ wall time ÷ peak.
"""
