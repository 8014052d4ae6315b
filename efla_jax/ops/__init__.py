"""The op: coefficients (the equation), scan (the reference), chunkwise (the fast form), attention (the calls)."""
