"""How long a network takes in the engine that will run it: engines, timing, prediction."""
