"""What training in several processes sends, holds and takes: a cost model, and the bytes that it is checked with."""
