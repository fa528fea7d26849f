"""Many runs of one config, with other seeds or on other folds, in one compiled program; and what they say together.

    python -m mnist_flax.population --config=configs/fast.py --seeds=10
    python -m mnist_flax.population --config=configs/one_conv_sgd.py --folds=5
    python -m mnist_flax.population --compare=runs/fast-seeds10,runs/tiny-seeds10

    members.py   trains: each member is a run with a folder of its own, and all of them take their steps together
    results.py   what they say together: mean, spread, committee, agreement, out-of-fold predictions
    compare.py   whether one result is better than another

`--seeds=M` gives the members the config's seed and those that follow it. `--folds=K` divides the training rows into K
stratified parts; member k has the config's seed plus k, and holds out part k. The same command again goes on with a
population that was stopped; a larger `--seeds` adds members to it.
"""
