/** A secret that is shown once: a new key, or what a webhook's notices are signed with. */

import { Button, Copy } from '../ui/basics.tsx';
import { Dialog } from '../ui/dialog.tsx';

export function Secret({ title, text, copy, onClose }: Props) {
  return (
    <Dialog title={title} onClose={onClose}>
      <div class="stack">
        <p>It is shown this once only.</p>
        <p class="url-line">
          <code>{text}</code>
          <Copy text={text} label={copy} />
        </p>
        <footer>
          <Button kind="primary" onClick={onClose}>
            Done
          </Button>
        </footer>
      </div>
    </Dialog>
  );
}

interface Props {
  title: string;
  text: string;
  /** What the button says that copies it. */
  copy: string;
  onClose: () => void;
}
