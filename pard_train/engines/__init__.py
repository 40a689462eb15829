"""Other people's engines. What runs inside of them is a file by itself: it is handed to another environment.

In the order of imports: vllm_engine, candidates, transformers_engine, tensorrt_llm.
"""
