"""Where a layer's weights are, and how they are whole while it runs.

In reading order:

    quantised   linears of bitsandbytes: what their weights are, dequantised
    counts      weights that a token meets, and those that are merged into
    packing     which linears bitsandbytes quantises, the bytes that they take, and doing it
    host        frozen weights in host memory, fetched one layer ahead
    whole       a layer's weights whole, once for all its chunks
"""
