"""A run as a page to read: how it learned, its mistakes and its calibration, and every number as JSON.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP]

The modules:

    write.py     writes numbers and pictures into a folder
    facts.py     the numbers
    layers.py    what happens inside the network
    plots.py     the plots, and bands.py those of populations: the only users of matplotlib
    pictures.py  the pictures made of pixels
    page.py      the page, from page.html.jinja
"""
