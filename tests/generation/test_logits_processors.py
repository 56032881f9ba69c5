import math

import torch

from qmix.generation.logits_processors import without_ids, without_repeated_ngrams, without_words


def banned(scores):
    return [row.isinf().nonzero()[:, 0].tolist() for row in scores]


def test_an_ngram_that_stands_already_is_not_completed_again():
    context = torch.tensor([[1, 2, 3, 1, 2], [4, 5, 6, 7, 8]])
    scores = torch.zeros(2, 10)
    assert banned(without_repeated_ngrams(scores, context, None, 3)) == [[3], []]
    assert banned(without_repeated_ngrams(scores, context, None, 2)) == [[3], []]
    assert banned(without_repeated_ngrams(scores, context, None, 1)) == [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert banned(without_repeated_ngrams(scores, context, None, 6)) == [[], []]
    assert banned(without_repeated_ngrams(scores, context[:, :0], None, 1)) == [[], []]


def test_padding_is_part_of_no_ngram():
    context = torch.tensor([[0, 2, 0, 5, 0]])
    attention_mask = torch.tensor([[False, True, True, True, True]])
    scores = torch.zeros(1, 6)
    assert banned(without_repeated_ngrams(scores, context, None, 2)) == [[2, 5]]
    assert banned(without_repeated_ngrams(scores, context, attention_mask, 2)) == [[5]]


def test_a_words_last_id_is_excluded_where_its_others_stand_last():
    context = torch.tensor([[1, 2, 3], [3, 2, 1]])
    scores = torch.zeros(2, 6)
    words = [[2, 3, 4], [5], [1, 0], [9], [1, 2, 3, 1, 2]]
    assert banned(without_words(scores, context, words, ())) == [[4, 5], [0, 5]]


def test_an_end_id_by_itself_is_let_through_and_in_a_word_is_not():
    context = torch.tensor([[1]])
    scores = torch.zeros(1, 4)
    assert banned(without_words(scores, context, [[2], [1, 2]], (2,))) == [[2]]
    assert banned(without_words(scores, context, [[2]], (2,))) == [[]]


def test_ids_outside_the_vocabulary_are_ignored():
    assert banned(without_ids(torch.zeros(1, 4), (3, 9, -1))) == [[3]]
    assert without_ids(torch.zeros(1, 4), ()).max() > -math.inf
