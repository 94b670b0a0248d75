import logging

from timm_vitres.commands import printing
from timm_vitres.commands.printing import printed_logs, say


def test_a_mistake_is_one_line_and_of_many_processes_says_whose(monkeypatch, capsys):
    say(ValueError('lr: got\n -1.'))
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '4')
    say(ValueError('lr: got -1.'))
    assert capsys.readouterr().err == 'timm-vitres: lr: got -1.\ntimm-vitres (process 2): lr: got -1.\n'
    for rank, count in (('x', '4'), ('2', '1'), ('2', '')):  # whatever stands there, a mistake is told
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', count)
        say(ValueError('lr: got -1.'))
    assert capsys.readouterr().err == 3 * 'timm-vitres: lr: got -1.\n'


def test_names_in_messages_move_no_cursor(capsys):
    printing.say(ValueError('key \x1b[2Jx\x07 is missing'))
    with printing.printed_logs():
        logging.getLogger('timm_vitres').warning('left out: %s\nand more', '\x1b[1A')
    assert capsys.readouterr().err == ('timm-vitres: key \\x1b[2Jx\\x07 is missing\nleft out: \\x1b[1A\nand more\n')


def test_what_the_library_logs_is_printed_while_the_block_runs(capsys):
    logger = logging.getLogger('timm_vitres.training.loop')
    with printed_logs():
        logger.info('epoch %d', 3)
        logger.warning('too few')
    logger.info('unheard')
    printed = capsys.readouterr()
    assert printed.out == 'epoch 3\n' and printed.err.splitlines()[-1] == 'too few' and 'unheard' not in printed.out
