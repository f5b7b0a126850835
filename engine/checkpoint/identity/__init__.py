"""What identifies a checkpoint and what can change a result: digests of weights, tokenizer and the family's source.

Below `opened_weights` and `weight_files`; nothing here builds a model or loads a tensor.
"""
