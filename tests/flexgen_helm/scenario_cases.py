"""One entry of each kind in run_specs/ that runs with data of ours: what docs/scenarios.md calls tested."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """An entry to be run by our client and by HELM's own."""

    entry: str
    quick: bool = False
    """Whether `make test` runs it; otherwise `make slow` does."""
    is_sampled: bool = False
    """Whether it has a temperature: no two clients draw the same, so that texts are compared with our own only."""
    only_scores: bool = False
    """Whether it generates nothing: log-probabilities of prompts are compared too."""
    extra_metrics: frozenset[str] = frozenset()
    """Metrics that need further packages or a network; where those lack, the run is compared without them."""
    is_chat: bool = False
    """Whether its requests are messages, which only a model with a chat template is asked."""
    max_tokens: int | None = None
    """Of an answer, where the entry's own would not leave a tiny model's window room for a prompt."""


def _needs(*metrics: str) -> frozenset[str]:
    return frozenset(metrics)


_CANONICAL = "data_augmentation=canonical"
_CONTRAST = "only_contrast=True,data_augmentation=contrast_sets"

CASES = (
    # generation
    Case(f"boolq:{_CANONICAL}", quick=True),
    Case(f"boolq:{_CONTRAST}"),
    Case(f"narrative_qa:{_CANONICAL}"),
    Case("narrative_qa:follow_format_instructions=instruct", quick=True),
    Case(f"news_qa:{_CANONICAL}"),
    Case(f"quac:{_CANONICAL}"),
    Case(f"natural_qa:mode=openbook_longans,{_CANONICAL}"),
    Case("natural_qa:mode=closedbook,follow_format_instructions=instruct"),
    Case(f"imdb:{_CANONICAL}"),
    Case(f"imdb:{_CONTRAST}", quick=True),
    Case(f"raft:subset=ade_corpus_v2,{_CANONICAL}"),
    Case(f"civil_comments:demographic=all,{_CANONICAL}"),
    Case("wmt_14:language_pair=cs-en", quick=True),
    Case("synthetic_reasoning:mode=pattern_match"),
    Case("synthetic_reasoning_natural:difficulty=easy"),
    Case("babi_qa:task=19"),
    Case("dyck_language:num_parenthesis_pairs=2"),
    Case("math:subject=number_theory,level=1,use_official_examples=True"),
    Case("math:subject=algebra,level=1,use_chain_of_thought=True"),
    Case("gsm", quick=True),
    Case("lextreme:subset=brazilian_court_decisions_judgment"),
    Case("lextreme:subset=covid19_emergency_event", quick=True),
    Case("lextreme:subset=lener_br"),
    Case("lex_glue:subset=ledgar"),
    Case("lex_glue:subset=unfair_tos"),
    Case("lex_glue:subset=case_hold"),
    Case("legalbench:subset=abercrombie,follow_format_instructions=instruct", quick=True),
    Case("entity_matching:dataset=Beer"),
    Case("entity_data_imputation:dataset=Buy", quick=True),
    Case("entity_data_imputation:dataset=Restaurant"),
    Case("data_wrangling:task=entity_matching,dataset=Beer", quick=True),
    Case("data_wrangling:task=entity_matching,dataset=DBLP-ACM"),
    Case("data_wrangling:task=data_imputation,dataset=Buy", quick=True),
    Case("data_wrangling:task=error_detection,dataset=Hospital"),
    Case("data_wrangling:task=error_detection,dataset=Adult"),
    Case("data_wrangling:task=schema_matching,dataset=Synthea"),
    Case("big_bench:max_train_instances=big_bench_few_shot_setting,task=semantic_parsing_spider,subtask="),
    Case("synthetic_efficiency:tokenizer=huggingface/gpt2,num_prompt_tokens=256,num_output_tokens=16"),
    Case("lm_entry:task=bigger_number"),
    Case("lm_entry:task=rhyming_word"),
    Case("wikifact:k=1,subject=capital,temperature=0", quick=True),
    # generation, sampled
    Case("wikifact:k=5,subject=plaintiff", quick=True, is_sampled=True),
    Case("summarization_xsum_rouge:temperature=0.3", quick=True, is_sampled=True),
    Case(
        "summarization_xsum_sampled:temperature=0.3,device=cpu",
        is_sampled=True,
        extra_metrics=_needs("SummarizationMetric"),
    ),
    Case(
        "summarization_cnndm:temperature=0.3,device=cpu", is_sampled=True, extra_metrics=_needs("SummarizationMetric")
    ),
    Case("billsum_legal_summarization", is_sampled=True, extra_metrics=_needs("SummarizationMetric")),
    Case("multilexsum_legal_summarization", is_sampled=True, extra_metrics=_needs("SummarizationMetric")),
    Case("code:dataset=humaneval", is_sampled=True),
    Case("code:dataset=apps,timeout=3", is_sampled=True),
    Case(
        "copyright:datatag=n_books_1000-extractions_per_book_1-prefix_length_125",
        is_sampled=True,
        extra_metrics=_needs("BasicCopyrightMetric"),
    ),
    Case(
        "disinformation:capability=reiteration,topic=climate",
        is_sampled=True,
        extra_metrics=_needs("DisinformationMetric", "DisinformationHumanEvalMetrics"),
    ),
    Case(
        "disinformation:capability=wedging",
        is_sampled=True,
        extra_metrics=_needs("DisinformationMetric", "DisinformationHumanEvalMetrics"),
    ),
    Case("real_toxicity_prompts", is_sampled=True, extra_metrics=_needs("ToxicityMetric")),
    Case("bold:subject=all", quick=True, is_sampled=True),
    # multiple choice
    Case(f"mmlu:subject=anatomy,{_CANONICAL}", quick=True),
    Case("mmlu:subject=anatomy"),
    Case(f"truthful_qa:task=mc_single,{_CANONICAL}"),
    Case("commonsense:dataset=openbookqa,method=multiple_choice_joint"),
    Case(
        f"commonsense:dataset=openbookqa,method=multiple_choice_separate_calibrated,{_CANONICAL}",
        quick=True,
        only_scores=True,
    ),
    Case(
        f"commonsense:dataset=commonsenseqa,method=multiple_choice_separate_calibrated,{_CANONICAL}",
        only_scores=True,
    ),
    Case(
        f"commonsense:dataset=hellaswag,method=multiple_choice_separate_original,{_CANONICAL}",
        only_scores=True,
    ),
    Case("blimp:phenomenon=anaphor_agreement", quick=True, only_scores=True),
    Case("legal_support"),
    Case("lsat_qa:task=all"),
    Case("med_qa"),
    Case("bbq:subject=all", quick=True),
    Case("simple_mcqa"),
    # leaderboards of long answers
    Case("mmlu_pro:subject=all,output_format_instructions=mmlu_pro", quick=True, max_tokens=32, is_sampled=True),
    Case("gpqa:subset=main,output_format_instructions=gpqa", max_tokens=32, is_sampled=True),
    Case("gpqa:subset=diamond,output_format_instructions=gpqa", max_tokens=32, is_sampled=True),
    Case("ifeval", max_tokens=32, extra_metrics=_needs("IFEvalMetric")),
    Case("wildbench:subset=v2", quick=True, is_chat=True, max_tokens=32),
    Case("omni_math", max_tokens=32),
    Case("xstest", max_tokens=32),
    Case("anthropic_red_team", max_tokens=32),
    Case("simple_safety_tests", max_tokens=32),
    Case("harm_bench", max_tokens=32),
    Case("harm_bench_gcg_transfer", max_tokens=32),
    Case("bbq:subject=all,method=multiple_choice_joint,output_format_instructions=mcqa,max_train_instances=0"),
    Case("air_bench_2024", max_tokens=32),
    # long contexts
    Case("ruler_hotpotqa:max_num_words=131072"),
    Case("ruler_squad:max_num_words=131072"),
    Case("infinite_bench_en_qa:max_num_words=131072"),
    Case("infinite_bench_en_mc:max_num_words=131072"),
    Case("infinite_bench_en_sum:max_num_words=131072", max_tokens=32),
    Case("openai_mrcr:needles=8,max_num_words=131072", is_chat=True, max_tokens=32),
    # medicine
    Case("medcalc_bench"),
    Case("medec", max_tokens=32),
    Case("head_qa"),
    Case("medbullets"),
    Case("medhelm_med_qa"),
    Case("medhelm_med_mcqa"),
    Case("aci_bench", max_tokens=32, extra_metrics=_needs("SummarizationMetric")),
    Case("med_dialog:subset=healthcaremagic", extra_metrics=_needs("SummarizationMetric")),
    Case("medi_qa", max_tokens=32, extra_metrics=_needs("SummarizationMetric")),
    Case("pubmed_qa"),
    Case("medhallu"),
    # language modelling and ranking
    Case("wikitext_103", only_scores=True),
    Case("the_pile:subset=BookCorpus2", only_scores=True),
    Case("twitter_aae:demographic=aa", quick=True, only_scores=True),
    Case("msmarco:track=regular,valid_topk=11", quick=True, extra_metrics=_needs("RankingMetric")),
    Case(f"msmarco:{_CANONICAL},track=regular,valid_topk=30", extra_metrics=_needs("RankingMetric")),
    Case(f"msmarco:{_CANONICAL},track=trec,valid_topk=30", extra_metrics=_needs("RankingMetric")),
)
