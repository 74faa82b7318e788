"""Precomputed traces for the book's explorer: `measure` makes them, `stored` is their form on disk, `findings` sums up.

python -m study.explorer --model pocket-plain --out data/explorer
"""
