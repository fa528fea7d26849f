"""The report of a run as an HTML page: learning curves, mistakes and calibration, with every number also as JSON.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP]

The modules:

    write.py     writes numbers and pictures into a folder
    facts.py     the numbers
    layers.py    the layers of the network and their inputs
    plots.py     the plots, and bands.py those of populations: the only users of matplotlib
    pictures.py  the bitmap pictures
    page.py      the page, from page.html.jinja
"""
