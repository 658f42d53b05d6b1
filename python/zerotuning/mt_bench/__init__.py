"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn answers, a judge, and a proxy that needs no judge.

questions: the 80 questions, and answers in FastChat's format.
conversation: the text of a dialogue that a model continues.
answers: both turns generated, in a file that can be resumed.
judge: a score from 1 to 10 for each answer, from a model behind an OpenAI-compatible endpoint.
proxy: log-likelihood and entropy of answers, which need no judge and measure no quality.
"""
