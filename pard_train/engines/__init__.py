"""External engines. Code that runs inside them is a self-contained file, because their environment is another one.

In the order of imports: vllm_engine, vllm_server, candidates, transformers_engine.
"""
