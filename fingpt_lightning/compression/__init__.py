"""``fingpt compress``: a dense model decomposed, refined, healed, rounded and measured."""
