"""A run as a page to read: how it learned, what it gets wrong and how sure it is, and every number as JSON.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP]

Its rooms:

    write.py     the whole: numbers and pictures into the run's folder
    facts.py     the numbers
    layers.py    what happens inside the network
    plots.py     the plots, the only place that knows matplotlib
    pixels.py    the pictures made of pixels
    page.py      the page, from page.html.jinja
"""
