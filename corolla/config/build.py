"""The strategy that a config names, made with its options and checked against all settings."""

from corolla.config import rules
from corolla.config.run import RunConfig
from corolla.interfaces import Strategy
from corolla.strategies import offset
from corolla.strategies.listing import registry


def build_strategy(config: RunConfig) -> Strategy:
    """The strategy with its options. Raises ConfigError; also for what it does not go with."""
    strategy = registry.create(config.strategy, config.options)
    rules.refuse(config, strategy)
    return offset.beside(strategy) if config.begins.offset else strategy
