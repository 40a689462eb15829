"""External engines. Code that runs inside them is a self-contained file, because their environment is another one.

In the order of imports: worker, process, vllm_server, candidates, transformers_engine.
"""
