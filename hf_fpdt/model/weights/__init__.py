"""Where a layer's weights are, and how they are whole while it runs.

In reading order:

    quantised   linears of bitsandbytes: what their weights are, dequantised
    packing     which linears bitsandbytes quantises, the bytes that they take, and doing it
    host        frozen weights in host memory, fetched one layer ahead
    whole       a layer's weights whole, once for all its chunks
"""
