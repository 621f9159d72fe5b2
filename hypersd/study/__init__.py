"""The blind study: ballots, votes, the choice of pairs, statistics, exports and the mirror. No torch, no screen."""
