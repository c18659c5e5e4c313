"""The critic's service under load: the real application on real Serve over real HTTP, on a cluster of its own.

latency     what guard, critic and HTTP add to the engine's own time, idle, one request at a time
throughput  critiques a second over HTTP against the same through the in-cluster handle
overload    ten times as many requests in flight as the service and its queue take
soak        half load for half an hour: memory and file descriptors

Two engines: `fixed` takes a fixed time a request (`serve_apps.fixed_time`), so that what is added is known
exactly; `policy` is the model of --config on vLLM. Exits with 1 where a bar is missed, and says which.
"""
