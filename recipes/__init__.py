"""Recipes: LightningCLI configs, one file per experiment. A package, so that `mue quickstart` finds its own."""
