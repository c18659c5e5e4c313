"""How fast is the preferences stage? The pipeline on Ray, bare vLLM, and one prompt at a time.

    ours    the policy deployed and warm on a local cluster of its own; timed is `read_prompts → generate →
            critique → outcome → write_preferences`, from the call to the last committed file
    raw     `vllm.LLM` with the same engine arguments, given the very requests of the rows that ours wrote: all
            candidates as one batch, then both orders of all critiques as one; at the best of its settings
    single  transformers' `generate`, one request after another: greedy, sampled, then both orders, on a part of
            the same prompts; at the best of its settings

The policy is the demo's, with layers added that change none of its answers (`benchmarks.pipeline.depth`): as it
is, an engine's step is so short that what Ray and Data compute beside it on the same cores decides. `--config
configs/demo.yaml --layers 6 --prompts 1200 --few 20` measures that.

Each runs in a fresh process a repeat, in an order that turns. Starting engines and loading weights is not timed,
nor is deploying ours. Ours is charged the start of Ray Data and of its workers, reading prompts and images, and
writing. Raw and single are charged decoding images and rendering prompts, and get both for nothing beyond that:
the requests are in memory when the clock starts, candidates for the critiques too.

    vs_raw_vllm         rows a second of ours ÷ of raw
    vs_one_at_a_time    rows a second of ours ÷ of single
    cache_share         prompt tokens of critiques that the engine had cached ÷ the most that it could have had:
                        whole blocks that an earlier critique began with too (`benchmarks.pipeline.layout`)
    orders_ratio        seconds of a case's two orders in one call ÷ of each from nothing cached; whole answers.
                        Beside it `orders_ratio_prefill`, of the first token alone, and `orders_ratio_tokens`, of
                        prompt tokens that the engine computes: where a model is so large that an engine's fixed
                        cost a step does not count, time goes by them
"""
