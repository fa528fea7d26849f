"""Compiled steps that the tests of single steps share."""

import jax

from mnist_flax.step import loss_fn, train_step, train_steps

jit_train_step = jax.jit(train_step, static_argnames="program", donate_argnames="state")
jit_train_steps = jax.jit(train_steps, static_argnames="program", donate_argnames="state")
step_once = jax.jit(train_step, static_argnames="program")  # keeps the state it is given
gradient = jax.jit(jax.grad(loss_fn, argnums=1, has_aux=True), static_argnums=0)
