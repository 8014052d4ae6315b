"""EFLA, DeltaNet and softmax attention as language models of one size on WikiText-2."""
