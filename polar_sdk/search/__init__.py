"""Searching: which programs are worth routing to, measured on prompts."""

from polar_sdk.search.matrix import RewardMatrix
from polar_sdk.search.menu import Menu, MenuProgram
from polar_sdk.search.options import SearchOptions, SearchResult, rewards_path
from polar_sdk.search.run import Search, search

__all__ = [
    "Menu",
    "MenuProgram",
    "RewardMatrix",
    "Search",
    "SearchOptions",
    "SearchResult",
    "rewards_path",
    "search",
]
